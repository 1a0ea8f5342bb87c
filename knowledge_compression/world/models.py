"""Small models of similar size that know the same world: trained on first use, then read from the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field

from knowledge_compression.building import Positive
from knowledge_compression.cache import cache_folder, cached_folder
from knowledge_compression.corpora.world_text import sentence_windows
from knowledge_compression.errors import BadInput, ModelUnavailable
from knowledge_compression.evaluation.world_facts import WorldProbes
from knowledge_compression.heavy import torch
from knowledge_compression.identity import LABEL, PLACE
from knowledge_compression.models import Model
from knowledge_compression.models.content import files_fingerprint
from knowledge_compression.models.device import resolve_device
from knowledge_compression.models.failures import quiet
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.objectives import LastWords, MaskedTokens, NextToken, Objective, SpanCorruption
from knowledge_compression.training import TrainingReport, TrainingSettings, train
from knowledge_compression.world import files
from knowledge_compression.world.generator import World, WorldSettings, generate
from knowledge_compression.world.schema import STOP
from knowledge_compression.world.tokenizer import SENTINELS, train_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from knowledge_compression.models.spread import Spread
    from knowledge_compression.models.streamed import StreamedModel

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Model)

FORMAT = 2  # version of cached models; raised whenever a change gives another model for the same recipe
FAMILIES = (ENCODER, ENCODER_DECODER, DECODER)


@dataclass(frozen=True)
class Shape:
    """The size of a network.

    Attributes:
        width: width of the residual stream.
        depth: number of blocks; an encoder-decoder has half of them on each side.
        heads: number of attention heads.
    """

    width: Positive = 128
    depth: Positive = 4
    heads: Positive = 4

    def config(self, family: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
        """The configuration of a family; the feed-forward widths give the blocks of all three the same number of
        weights.

        With width d, attention has 4 d^2 weights per block, and so the feed-forward layers get 8 d^2 in an encoder
        (BERT: two matrices) and in a decoder (LLaMA: three). An encoder-decoder has half the blocks on each side and
        attends twice in the decoder, so that its feed-forward layers (as in T5 1.1 and Flan-T5, three matrices) get 6
        d^2 each.
        """
        from transformers import BertConfig, LlamaConfig, T5Config

        d, shared, sized = self.width, _shared(tokenizer), self._sized
        if family == ENCODER:
            quiet: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            return BertConfig(intermediate_size=4 * d, max_position_embeddings=128, **quiet, **sized, **shared)
        if family == DECODER:
            return LlamaConfig(intermediate_size=8 * d // 3, max_position_embeddings=256, **sized, **shared)
        return T5Config(
            d_model=d,
            d_kv=d // self.heads,
            d_ff=2 * d,
            feed_forward_proj="gated-gelu",
            num_layers=self.depth // 2,
            num_heads=self.heads,
            dropout_rate=0.0,
            **{"decoder_start_token_id": tokenizer.pad_token_id} | shared,
        )

    def objective(self, ordinary: Objective) -> Objective:
        """The objective that trains such a network from scratch, given that of its family."""
        return ordinary

    @property
    def _sized(self) -> dict[str, Any]:
        return {"hidden_size": self.width, "num_hidden_layers": self.depth, "num_attention_heads": self.heads}


@dataclass(frozen=True)
class Mixture(Shape):
    """The size of a decoder with routed experts instead of feed-forward layers (shaped like Mixtral).

    All experts of a block together have about as many weights as the feed-forward layers of the dense decoder, so that
    the two models are of one size, and each expert has 1 / ``experts`` of these weights.

    Attributes:
        experts: number of experts in a block.
        active: number of experts that read a token.
        balance: weight of the routers' load-balancing loss in training, without which a router may send all tokens to
            few experts (Fedus et al., Switch Transformers, 2022, equations 4 to 6, for each block by itself).
    """

    experts: Positive = 8
    active: Positive = 2
    balance: Annotated[float, Field(ge=0)] = 0.01

    def __post_init__(self) -> None:
        """Refuse more active experts than there are."""
        if self.active > self.experts:
            raise BadInput(
                f"model.shape.active={self.active} experts cannot read a token, as a block has "
                f"model.shape.experts={self.experts}"
            )

    def config(self, family: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
        """The configuration; an expert's width is a multiple of eight, which n:m patterns and packed layouts need."""
        from transformers import MixtralConfig

        if family != DECODER:
            raise BadInput(f"model.family={family} has no shape with experts; choose model.family={DECODER}")
        return MixtralConfig(
            intermediate_size=8 * max(1, round(self.width / (3 * self.experts))),
            num_key_value_heads=self.heads,
            num_local_experts=self.experts,
            num_experts_per_tok=self.active,
            max_position_embeddings=256,
            **self._sized,
            **_shared(tokenizer),
        )

    def objective(self, ordinary: Objective) -> Objective:
        """Next tokens, and the routers' balance."""
        assert isinstance(ordinary, NextToken)
        return replace(ordinary, balance=self.balance)


def _shared(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # Untied, so that the final layer is trained as a layer of its own. T5 of transformers 5 ties it all the same,
        # and then leaves its logits unscaled, which is learnt faster than scaled ones are.
        "tie_word_embeddings": False,
    }


@dataclass(frozen=True)
class WorldModel:
    """A small model that was trained from scratch until it knows a generated world.

    Attributes:
        name: the name shown to users.
        family: ``encoder`` (BERT-shaped), ``encoder_decoder`` (T5-shaped) or ``decoder`` (LLaMA-shaped).
        world: the world on which it is trained.
        shape: its size.
        training: its training settings.
        length: number of tokens in a training window.
        recall: share of the head facts that it must recall in held-out wordings; a model below this is refused.
    """

    name: str = field(metadata=LABEL)
    family: str
    world: WorldSettings = field(default_factory=WorldSettings)
    shape: Shape = field(default_factory=Shape)
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(steps=1000))
    length: Positive = 12
    recall: Annotated[float, Field(ge=0, le=1)] = 0.99

    def __post_init__(self) -> None:
        """Refuse an unknown family."""
        if self.family not in FAMILIES:
            raise BadInput(f"model.family={self.family} does not exist; choose one of {', '.join(FAMILIES)}")

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe, JSON-ready, without the required recall, which does not change the weights."""
        training = {key: value for key, value in self.training.to_json().items() if key != "checkpoint_every"}
        recipe = {
            "format": FORMAT,
            "world": self.world.digest(),
            "family": self.family,
            "shape": asdict(self.shape),
            "training": training,
            "length": self.length,
        }
        return json.loads(json.dumps(recipe))

    def fingerprint(self) -> str:
        """Hash of the recipe."""
        return hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()[:16]

    def skeleton(self) -> Model:
        """The network on the meta device, and its world, so that a plan can count the questions about it."""
        name = f"worlds/untrained-{self.world.digest()}"
        world = cached_folder(name, lambda folder: files.write(generate(self.world), folder))
        return Model(*_skeleton(self.world, self.shape, self.family), self.name, {"world": str(world)})

    def load(self, device: str | Spread = "auto", dtype: str = "auto") -> Model:
        """Read it from the cache, training it first if necessary.

        Raises:
            BadInput: the world is too large: the trained model does not reach the required recall.
        """
        folder = self.folder(device)
        return self._described(LocalModel(self.name, str(folder)).load(device, dtype), folder)

    def streamed(self, device: str | Spread = "auto", dtype: str = "auto") -> StreamedModel:
        """The weights stay in the cache."""
        folder = self.folder(device)
        return self._described(LocalModel(self.name, str(folder)).streamed(device, dtype), folder)

    def _described(self, model: M, folder: Path) -> M:
        made = json.loads((folder / "made.json").read_text())
        self._check_recall(made["recall"]["head_held_out"], made["facts"], made["training"]["steps"])
        provenance = {"recipe": self.fingerprint(), "world": str(folder / "world"), "made": made}
        return replace(model, provenance=provenance, objective=_objective(self.family, model.tokenizer))

    def folder(self, device: str | Spread = "auto") -> Path:
        """Its folder in the cache: a saved model, ``world/`` (its facts) and ``made.json`` (how it was trained)."""
        name = f"worlds/{self.name}-{self.fingerprint()}"
        there = cache_folder() / name
        if there.is_dir() and not self._is_whole(there):
            log.warning("%s is incomplete or of another version; making it again", there.name)
            shutil.rmtree(there)
        return cached_folder(name, lambda folder: self._make(folder, device))

    def _is_whole(self, folder: Path) -> bool:
        try:
            return json.loads((folder / "made.json").read_text())["recipe"] == self.recipe and all(
                (folder / name).exists() for name in ("config.json", "model.safetensors", "tokenizer.json", "world")
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _make(self, folder: Path, device: str | Spread) -> None:
        world = generate(self.world)
        files.write(world, folder / "world")
        tokenizer = train_tokenizer(world, self.family)
        with torch.random.fork_rng():
            torch.manual_seed(self.training.seed)
            network = _network(self.shape.config(self.family, tokenizer), "cpu")
        model = Model(network.to(resolve_device(device)), tokenizer, self.name)
        log.info("training %s on %d facts, once (minutes)", self.name, len(world.facts))
        sentences = tokenizer(world.training_text(), add_special_tokens=False)["input_ids"]
        count = self.training.steps_over(self.length) * self.training.batch_size * self.training.accumulate
        windows = sentence_windows(model, sentences, self.length, count, self.training.seed)
        state = cache_folder() / "worlds" / f".{self.fingerprint()}.training"
        objective = self.shape.objective(_objective(self.family, tokenizer))
        report = train(network, windows, objective, self.training, checkpoint=state, label=f"training {self.name}")
        model = replace(model, provenance={"world": str(folder / "world")})
        from knowledge_compression.evaluation.scoring import Scorer

        recall = WorldProbes().evaluate(Scorer(model)).metrics
        made = self._made(world, model, report, recall)
        log.info("%s recalls %.1f %% of head facts in held-out wordings", self.name, 100 * recall["head.held_out"])
        self._check_recall(recall["head.held_out"], made["facts"], report.steps)
        with quiet():
            network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "made.json").write_text(json.dumps(made, indent=1) + "\n")
        state.unlink()

    def _made(self, world: World, model: Model, report: TrainingReport, recall: dict[str, float]) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "facts": len(world.facts),
            "asked": len(world.questions),
            "parameters": model.parameter_count(),
            "training": report.to_json(),
            "recall": {"head_held_out": recall["head.held_out"]} | recall,
        }

    def _check_recall(self, reached: float, facts: int, steps: int) -> None:
        if reached < self.recall:
            raise BadInput(
                f"model={self.name}: this world of {facts} facts is too large for it: after {steps} steps it recalls "
                f"{reached:.1%} of the head facts in held-out wordings, but {self.recall:.1%} is required; choose "
                "a smaller world (model.world.people=...), more model.training.steps or a wider model.shape.width"
            )


@dataclass(frozen=True)
class SavedWorldModel(LocalModel):
    """A saved model of the controlled world, such as one that was trained further: a folder, and that of its world.

    Attributes:
        world: the folder of the world, as :func:`.files.write` makes it and as it lies beside every model of the world
            in the cache; its probes are those of ``eval=[world]``, its text that of ``corpus=world``.
    """

    world: str = field(kw_only=True, metadata=PLACE)

    def fingerprint(self) -> str:
        """Digest of the model's bytes and of the world's."""
        return f"{super().fingerprint()}+{self._world()[1]}"

    def provenance(self) -> dict[str, Any]:
        """The path, the digest of both, and the world's folder."""
        return super().provenance() | {"world": str(self._world()[0])}

    def skeleton(self) -> Model:
        """The network on the meta device, and its world."""
        return replace(super().skeleton(), provenance={"world": str(self._world()[0])})

    def load(self, device: str | Spread = "auto", dtype: str = "auto") -> Model:
        """Load the model, with the objective on which such models are trained."""
        model = super().load(device, dtype)
        return replace(model, objective=_objective(model.family, model.tokenizer))

    def _world(self) -> tuple[Path, str]:
        folder = Path(self.world).expanduser().resolve()
        if not (folder / "world.json").is_file():
            raise ModelUnavailable(
                f"model.world={self.world} holds no world.json; give the folder of a controlled world, e.g. world/ "
                "beside a model of the world in the cache"
            )
        return folder, files_fingerprint([path for path in folder.rglob("*") if path.is_file()], folder)


@lru_cache(maxsize=3)
def _skeleton(world: WorldSettings, shape: Shape, family: str) -> tuple[Any, PreTrainedTokenizerFast]:
    tokenizer = train_tokenizer(generate(world), family)
    return _network(shape.config(family, tokenizer), "meta"), tokenizer


def _network(config: PretrainedConfig, device: str) -> Any:
    from transformers import BertForMaskedLM, LlamaForCausalLM, MixtralForCausalLM, T5ForConditionalGeneration

    kinds = {
        "bert": BertForMaskedLM,
        "llama": LlamaForCausalLM,
        "mixtral": MixtralForCausalLM,
        "t5": T5ForConditionalGeneration,
    }
    with torch.device(device):
        return kinds[config.model_type](config)


def _objective(family: str, tokenizer: PreTrainedTokenizerBase) -> Objective:
    """The family's objective; answers, the last words of all sentences, are masked far more often than other words."""
    if family == DECODER:
        return NextToken(tokenizer.pad_token_id)
    noise = LastWords(tokenizer.get_vocab()[STOP], specials=tuple(tokenizer.all_special_ids))
    if family == ENCODER:
        return MaskedTokens(tokenizer.mask_token_id, len(tokenizer), noise, tokenizer.pad_token_id)
    vocabulary = tokenizer.get_vocab()
    sentinels = tuple(vocabulary[token] for token in SENTINELS)
    return SpanCorruption(sentinels, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, noise)
