"""The work of a suite on a kind of network, counted on a miniature with the same depth but a tiny width and vocabulary.

The number of tokens that pass each matrix depends neither on widths nor on the network's answers. With the true
vocabulary, the miniature's logits, hundreds of thousands per position, would take almost all of the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from knowledge_compression.compression.walk.expert_inputs import ExpertProducts, one_expert_after_the_other
from knowledge_compression.evaluation.scoring import Blank, Likelihood, Question, Scorer
from knowledge_compression.evaluation.scoring.budget import Budget
from knowledge_compression.evaluation.scoring.positions import Position
from knowledge_compression.models import Model
from knowledge_compression.models.families import ENCODER_DECODER
from knowledge_compression.models.pretrained import auto_class
from knowledge_compression.models.roles import EXPERTS
from knowledge_compression.models.targets import linear_layers

_NARROW, _HEAD = 8, 4  # width of a miniature's hidden state per head, and width of a head
_WIDTHS = (
    "intermediate_size",
    "d_ff",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "hidden_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "intermediate_size_mlp",
)
_TRIED = 512  # tokens that are sent through to find the share that reaches an expert
_WORDS = 2048  # maximum in a miniature's vocabulary


@dataclass(frozen=True)
class Work:
    """The work of a suite on a kind of network.

    Attributes:
        tokens: number of tokens that pass each matrix, by path; for an expert, the tokens sent to it.
        widest: maximum number of tokens that pass the head at once.
        items: number of rows in the item table.
        compared: number of positions at which ``distance=true`` compares distributions.
    """

    tokens: Mapping[str, int]
    widest: int
    items: int
    compared: int


def rehearse(skeleton: Model, suite: Any) -> Work:
    """Rehearse a suite on a miniature of the network, and count.

    Args:
        skeleton: the network on the meta device.
        suite: an evaluation suite.
    """
    small = miniature(skeleton)
    dense = deepcopy(small.network)  # without the hooks that count
    widest = 0

    def note_width(_: nn.Module, inputs: Any, __: Any) -> None:
        nonlocal widest
        widest = max(widest, inputs[0].numel() // inputs[0].shape[-1])

    scorer = _Rehearsing(small, skeleton, original=lambda: replace(small, network=dense))
    small.network.get_submodule(small.architecture.final).register_forward_hook(note_width)
    with counting(small) as tokens, torch.random.fork_rng([]):
        evaluation = suite.evaluate(scorer)
    return Work(dict(tokens), widest, evaluation.items.height, len(scorer.compared.keys))


class _Rehearsing(Scorer):
    """A scorer of a miniature that reads what the true model's scorer would, and finds all answers equally likely."""

    def __init__(self, small: Model, skeleton: Model, original: Callable[[], Model]) -> None:
        super().__init__(small, original=original, watcher=_Compared())
        self.compared: _Compared = self.watcher  # type: ignore[assignment]
        self._skeleton = skeleton
        self.budget = Budget(skeleton, device=small.device)

    @property
    def max_positions(self) -> int | None:
        return self._skeleton.max_positions

    def distributions(self, blanks: Sequence[Blank]) -> Iterator[tuple[list[int], Tensor]]:
        words = int(self._skeleton.text_config.vocab_size)
        for indices, _ in super().distributions(blanks):
            yield indices, torch.zeros(1, 1).expand(len(indices), words)

    def distributions_by_depth(self, blanks: Sequence[Blank]) -> Iterator[tuple[list[int], Tensor]]:
        words = int(self._skeleton.text_config.vocab_size)
        for indices, of_each in super().distributions_by_depth(blanks):
            yield indices, torch.zeros(1, 1, 1).expand(*of_each.shape[:2], words)

    def log_likelihoods(self, questions: Sequence[Question]) -> list[list[Likelihood]]:
        """For the same questions in the miniature's words; ids keep their order, so common beginnings stay shared."""
        texts = [of for question in questions for of in (question.context, *question.continuations)]
        there = sorted({token for text in texts for token in text})
        words = int(self.model.text_config.vocab_size)
        number = {token: i % words for i, token in enumerate(there)}
        return super().log_likelihoods(
            [
                replace(
                    question,
                    context=[number[token] for token in question.context],
                    continuations=[[number[token] for token in text] for text in question.continuations],
                )
                for question in questions
            ]
        )


class _Compared:
    """A watcher that counts the positions at which ``distance=true`` compares."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()

    def saw(self, positions: Sequence[Position], states: Tensor, logits: Tensor) -> None:
        self.keys |= {position.key for position in positions if position.gold}


@contextmanager
def counting(model: Model) -> Iterator[Counter[str]]:
    """Count the tokens that pass each matrix of a network in this context; for an expert, those sent to it."""
    tokens: Counter[str] = Counter()

    def count(path: str, _: nn.Module, inputs: Any, __: Any) -> None:
        tokens[path] += inputs[0].numel() // inputs[0].shape[-1]

    layers = linear_layers(model)
    with ExitStack() as hooks:
        for layer in layers:
            if layer.expert is None:
                hooks.callback(layer.module.register_forward_hook(partial(count, layer.path)).remove)
        if experts := [layer for layer in layers if layer.expert]:
            hooks.enter_context(one_expert_after_the_other(model.network))
            hooks.enter_context(_CountedExperts(experts, tokens))
        yield tokens


class _CountedExperts(ExpertProducts):
    def __init__(self, layers: Any, tokens: Counter[str]) -> None:
        super().__init__(layers)
        self._tokens = tokens

    def saw(self, path: str, values: Tensor, output: Tensor) -> Tensor:
        self._tokens[path] += len(values)
        return output


def reached(skeleton: Model) -> Callable[[int], dict[str, float]]:
    """The number of tokens that pass each matrix in one pass over some text: all of them, or an expert's part.

    The weights decide to which experts a token is sent, but not to how many. So all experts of a block are assumed to
    get equally many tokens.
    """
    layers = linear_layers(skeleton)
    blocks = skeleton.architecture.block_paths(skeleton.network)
    experts: dict[str, list[str]] = {}
    for layer in layers:
        if layer.role == EXPERTS:  # parts of a bank, or modules of their own as in Switch
            block = next(block for block in blocks if layer.path.startswith(f"{block}."))
            experts.setdefault(block, []).append(layer.path)
    shares: dict[str, float] = {layer.path: float(layer.uses) for layer in layers}
    if experts:
        small = miniature(skeleton)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(small.text_config.vocab_size, (8, _TRIED // 8), generator=draw)
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if small.family == ENCODER_DECODER else {})
        with counting(small) as tokens, torch.inference_mode():
            small.network(**inputs)
        for paths in experts.values():
            shares |= dict.fromkeys(paths, sum(tokens[path] for path in paths) / len(paths) / _TRIED)
    return lambda count: {path: share * count for path, share in shares.items()}


def miniature(skeleton: Model) -> Model:
    """A network of the same kind, a few numbers wide, on the CPU, which reads any token as one of a few."""
    from transformers import AutoTokenizer

    config = deepcopy(skeleton.network.config)
    _shrink(config)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = auto_class(config).from_config(config, dtype=torch.float32).eval()
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(_as_one_of_its_words)
    tokenizer = skeleton.tokenizer or AutoTokenizer.from_pretrained(skeleton.network.config._name_or_path)
    return Model(network, tokenizer, skeleton.name, skeleton.provenance)


def _as_one_of_its_words(module: nn.Embedding, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] % module.num_embeddings, *inputs[1:])


def _shrink(config: Any) -> None:
    """Make a configuration and those inside it narrow."""
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            _shrink(getattr(config, name))
    width = getattr(config, "hidden_size", None)
    if width is None:  # it only holds others
        return
    if getattr(config, "vocab_size", None):
        config.vocab_size = min(config.vocab_size, _WORDS)
        if isinstance(config.pad_token_id, int):
            config.pad_token_id %= config.vocab_size
    if getattr(config, "head_dim", None):
        config.head_dim = _NARROW if config.head_dim * config.num_attention_heads == width else _HEAD
    if hasattr(config, "d_kv"):
        config.d_kv = _HEAD
    config.hidden_size = _NARROW * config.num_attention_heads
    for name in ("embedding_size", "word_embed_proj_dim", "cross_attention_hidden_size"):
        if getattr(config, name, None) is not None:  # if it equals that of the hidden states there is no layer between
            setattr(config, name, config.hidden_size if getattr(config, name) == width else _NARROW)
    # A bank's matrices must differ from their transposes: neither the inner width nor twice it may equal the outer one.
    inner = _NARROW if config.hidden_size > 2 * _NARROW else 12
    for name in _WIDTHS:
        if getattr(config, name, None):
            setattr(config, name, inner)


def multiply_adds(skeleton: Model, tokens: Mapping[str, float]) -> float:
    """Multiply-adds of all matrices of the true network, for so many tokens through each."""
    return float(sum(layer.parameters * tokens.get(layer.path, 0) for layer in linear_layers(skeleton)))
