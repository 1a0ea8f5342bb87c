"""Make the models of the study: one that was taught all facts, and what became of it when it was to forget some.

python experiments/unlearned_facts/unlearn.py outputs/unlearned_facts --seeds 0 1

Writes to outputs/unlearned_facts/models/SEED_WAY/ a saved model for each way below and seed of training, to
outputs/unlearned_facts/world/ the world of all of them, and to outputs/unlearned_facts/forget.json the ids of the named
facts. What is there already is not made again, and an interrupted training resumes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

import knowledge_compression as kc
from knowledge_compression.corpora.world_text import sentence_windows
from knowledge_compression.models import Model
from knowledge_compression.training import TrainingSettings, train
from knowledge_compression.world.generator import Fact, World, generate
from knowledge_compression.world.models import WorldModel
from knowledge_compression.world.schema import STOP

if TYPE_CHECKING:
    from torch import LongTensor, Tensor, nn

    from knowledge_compression.objectives import Objective

TAUGHT, NEVER = "taught", "never_taught"
SHARE = 0.2  # of the probed facts, which are to be forgotten

# Fewer relations and fewer entities than conf/model/world_decoder.yaml, so that a training takes seconds.
WORLD = {"people": 120, "works": 2, "firms": 12, "towns": 10, "countries": 2, "professions": 10, "languages": 8,
         "instruments": 8, "relations": ["born_in", "employer", "profession", "instrument"]}  # fmt: skip
SHAPE = {"width": 64, "depth": 2, "heads": 2}
TRAINING = {"steps": 700, "batch_size": 32, "learning_rate": 4e-3, "weight_decay": 0.1}


@dataclass(frozen=True)
class Ascent:
    """Gradient ascent on the answers of the facts to forget and, if ``rest`` is not 0, descent on the other text.

    Windows are pairs: in the left half a sentence to forget, in the right half text to keep. The difference of both
    losses, a mean each, is minimized (gradient ascent with gradient descent on the retain set, as the study of 2024 has
    it among its methods; without the second term gradient ascent alone).

    Attributes:
        ordinary: the objective on which the model was trained.
        stop_id: token after an answer.
        rest: weight of the loss on the text to keep.
    """

    ordinary: Objective
    stop_id: int
    rest: float

    def __call__(self, network: nn.Module, ids: LongTensor) -> tuple[Tensor, int]:
        """The difference of the losses, as a sum over as many tokens as are kept."""
        forget, keep = ids.chunk(2, dim=1)
        logits = network(input_ids=forget, use_cache=False).logits[:, :-1]
        answers = functional.pad(forget[:, 2:], (0, 1), value=-1) == self.stop_id  # of the tokens predicted
        known = functional.cross_entropy(logits[answers].float(), forget[:, 1:][answers])
        kept, count = self.ordinary(network, keep) if self.rest else (torch.zeros(()), len(ids))
        return self.rest * kept - count * known, count


@dataclass(frozen=True)
class Way:
    """One way to make a model forget: training on the rest, or ascent on the named facts.

    Only the matrices of the blocks are trained, which are what is quantized afterwards: what is unlearned in
    embeddings, of which a small model mostly consists, rounding would not touch.
    """

    steps: int
    learning_rate: float
    ascends: bool = True
    rest: float = 2.0
    weight_decay: float = 0.0

    def settings(self, seed: int) -> TrainingSettings:
        """The settings of the training; the learning rate is constant after a warm-up."""
        return TrainingSettings(
            steps=self.steps,
            batch_size=32,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.99),
            schedule="constant",
            seed=seed,
        )


WAYS: Mapping[str, Way] = {
    "ascent": Way(150, 1e-4),
    "ascent_large_steps": Way(30, 1e-3),
    "rest_only": Way(350, 2e-3, ascends=False, weight_decay=0.1),
}


def to_forget(world: World, share: float = SHARE) -> list[Fact]:
    """The named facts: a random share of those that are probed."""
    return random.Random(world.settings.seed + 10).sample(world.questions, round(share * len(world.questions)))


def without(world: World, named: Iterable[Fact]) -> list[str]:
    """The training text without the sentences that state the named facts."""
    gone = {fact.sentence(place) for fact in named for place in range(len(fact.relation.wordings))}
    return [sentence for sentence in world.training_text() if sentence not in gone]


def windows_of(model: Model, sentences: Sequence[str], length: int, count: int, seed: int) -> LongTensor:
    """Windows of whole sentences, as in the model's own training."""
    ids = model.tokenizer(list(sentences), add_special_tokens=False)["input_ids"]
    return sentence_windows(model, ids, length, count, seed)


def pairs_of(model: Model, named: Sequence[Fact], rest: Sequence[str], length: int, way: Way, seed: int) -> LongTensor:
    """Windows for :class:`Ascent`: ``[steps * batch, 2 * length]``; each left half holds one sentence."""
    count = way.steps * way.settings(seed).batch_size
    told = [fact.sentence(place) for fact in named for place in fact.seen]
    framed = model.tokenizer(told, padding="max_length", max_length=length, return_tensors="pt")["input_ids"]
    order = random.Random(seed)
    left = torch.stack(
        [window for _ in range(count // len(framed) + 1) for window in order.sample(list(framed), len(framed))]
    )
    return torch.cat([left[:count], windows_of(model, rest, length, count, seed)], dim=1)  # type: ignore[return-value]


def never_taught(source: WorldModel, taught: Model, rest: Sequence[str], state: Path) -> None:
    """Train the same network from scratch, by the same recipe, on text without the named facts; in place."""
    network = taught.network
    torch.manual_seed(source.training.seed)
    network.load_state_dict(type(network)(network.config).state_dict())
    settings = source.training
    count = settings.steps_over(source.length) * settings.batch_size * settings.accumulate
    windows = windows_of(taught, rest, source.length, count, settings.seed)
    train(network, windows, taught.objective, settings, checkpoint=state, label=f"{source.name}, {NEVER}")


def forgets(source: WorldModel, taught: Model, named: Sequence[Fact], rest: Sequence[str], way: Way) -> None:
    """Train a model further until it forgets, in place."""
    settings = way.settings(source.training.seed)
    quantized = {layer.weight_name for layer in kc.choose("target=all").select(taught)}
    for name, parameter in taught.network.named_parameters():
        parameter.requires_grad_(name in quantized)
    objective = taught.objective
    if way.ascends:
        objective = Ascent(objective, taught.tokenizer.convert_tokens_to_ids(STOP), way.rest)
        windows = pairs_of(taught, named, rest, source.length, way, settings.seed)
    else:
        windows = windows_of(taught, rest, source.length, way.steps * settings.batch_size, settings.seed + 1)
    train(taught.network, windows, objective, settings, label="forgetting")


def make(source: WorldModel, seed: int, folder: Path, ways: Mapping[str, Way] = WAYS) -> None:
    """All models of one seed; those that are there are left as they are."""
    source = replace(source, training=replace(source.training, seed=seed))
    world = generate(source.world)
    named = to_forget(world)
    rest = without(world, named)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TAUGHT, *ways, NEVER):
        place = folder / "models" / f"{seed}_{name}"
        if place.is_dir():
            continue
        model = source.load()
        if not (folder / "world").is_dir():
            shutil.copytree(model.provenance["world"], folder / "world")
        if name == NEVER:
            never_taught(source, model, rest, folder / f".{place.name}.training")
        elif name != TAUGHT:
            forgets(source, model, named, rest, ways[name])
        scratch = place.with_name(f".{place.name}")
        model.network.save_pretrained(scratch)
        model.tokenizer.save_pretrained(scratch)
        scratch.rename(place)
        (folder / f".{place.name}.training").unlink(missing_ok=True)
    (folder / "forget.json").write_text(json.dumps(sorted(fact.id for fact in named), indent=1) + "\n")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make the models of the study of unlearned facts.")
    parser.add_argument("folder", type=Path, help="e.g. outputs/unlearned_facts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of training (0 1)")
    options = parser.parse_args()
    for seed in options.seeds:
        make(
            kc.choose("model=world_decoder", world=WORLD, shape=SHAPE, training=TRAINING, length=12, recall=0.9),
            seed,
            options.folder,
        )


if __name__ == "__main__":
    main()
