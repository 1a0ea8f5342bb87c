"""The norms or linear layers that produce the inputs of a block's linear layers, and can take factors of these inputs.

Multiplying a weight's columns by factors changes nothing if the inputs are divided by them, and that costs nothing if
the norm or layer that produces the inputs can be divided instead. Which one it is, is found by trials on the block
itself rather than by names. All trials use powers of two, which multiply without rounding: if the output is bit for bit
the same, it is also the same for any other factors, up to their rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from knowledge_compression.compression.walk.layer_inputs import identified, reading
from knowledge_compression.compression.walk.statistics import D, Observed
from knowledge_compression.models.targets import TargetLayer

# Parts of a matrix: all, the second half, the last third, ...
_PARTS = ((0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (0, 3))
_BASE = 8  # base of the digits that encode a row's index: 2^-7 is far from underflow in every type
_TRIED = 3  # powers of two used in a trial

Group = Sequence[TargetLayer]


@dataclass(frozen=True, eq=False)
class Source:
    """The parameters that produce the inputs of linear layers, and can be divided by factors.

    Attributes:
        tensors: its parameters, or parts of them, each divided along its first dimension; changed in place.
        entry: the index of the entry that produces each input, int64 ``[in_features]``; heads may share one.
        names: the network's names for the parameters.
        narrow: the 16-bit type that holds them exactly and must still hold them after the division; None if there is no
            such type, or for linear layers, which are compressed anyway. Most norms are stored in 16 bits, and a file
            that had to hold one of them more precisely would be twice as large.
    """

    tensors: Sequence[Tensor]
    entry: Tensor
    names: Sequence[str]
    narrow: torch.dtype | None = None

    @property
    def entries(self) -> int:
        """The number of factors that it takes."""
        return len(self.tensors[0])

    def divide(self, factors: Tensor) -> None:
        """Divide its entries by the factors ``[in_features]`` of the inputs that they produce."""
        of_entries = torch.ones(self.entries, device=factors.device)
        of_entries[self.entry.to(factors.device)] = factors
        _divide(self.tensors, of_entries)
        if self.narrow is not None:
            for tensor in self.tensors:
                tensor.copy_(tensor.to(self.narrow))

    def divisible(self, factors: Tensor) -> Tensor:
        """The nearest factors for which the narrow type still holds the quotients exactly."""
        if self.narrow is None:
            return factors
        weight = self.tensors[0].float()
        stored = (weight / factors).to(self.narrow).float()
        usable = (stored != 0) & stored.isfinite() & (weight != 0)
        return torch.where(usable, weight / stored, 1.0)


def fold(block: Observed[D], choose: Callable[[Tensor, D, Tensor], Tensor]) -> None:
    """Multiply the weights of a block by factors of their inputs, and divide the parameters that produce these inputs.

    Args:
        block: the block; groups of layers whose inputs cannot be divided stay as they are.
        choose: returns the factors, float32 ``[entries]``, given the stacked weights of a group before any change, the
            statistics of its inputs, and the index of the entry that produces each input.
    """
    found = sources_of(block.module, block.path, [layers for layers, _ in block.groups], block.run)
    moved = []
    for (layers, statistics), source in zip(block.groups, found, strict=True):
        if source is not None:
            weight = torch.cat([layer.weight for layer in layers]).float()
            entry = source.entry.to(weight.device)
            moved.append((layers, statistics, source, source.divisible(choose(weight, statistics, entry))[entry]))
    for layers, statistics, source, factors in moved:
        source.divide(factors)
        _multiply(layers, factors)
        statistics.divide(factors)
        statistics.factors, statistics.divided_by = factors, source.names


def sources_of(block: nn.Module, path: str, groups: Sequence[Group], run: Callable[[], Any]) -> list[Source | None]:
    """For each group of layers, the parameters that produce their inputs and nothing else; None if there are none.

    Args:
        block: the module that holds all of them.
        path: its name in the network.
        groups: layers that read the same tensor, in the order in which they run. Only these layers, and norms, are
            candidates, because nothing else may be changed.
        run: runs the block on some text and returns its output.
    """
    return _Trials(block, path, groups, run).sources()


@dataclass(frozen=True)
class _Pair:
    """A group, and the part of an earlier layer that may produce its inputs."""

    number: int
    reader: TargetLayer
    made_by: TargetLayer
    rows: slice

    @property
    def tensors(self) -> list[Tensor]:
        bias = self.made_by.bias
        return [self.made_by.weight[self.rows], *([] if bias is None else [bias[self.rows]])]

    @property
    def height(self) -> int:
        return len(self.tensors[0])


@dataclass
class _Trials:
    block: nn.Module
    path: str
    groups: Sequence[Group]
    run: Callable[[], Any]
    found: dict[int, Source] = field(default_factory=dict)

    def sources(self) -> list[Source | None]:
        self.layers = {layer.path: layer for group in self.groups for layer in group}
        made: dict[tuple[Any, ...], str] = {}
        with self._norms(made):
            self.inputs, self.output = self._observe()
        routed = [i for i, group in enumerate(self.groups) if group[0].expert_number is not None]
        for number, group in enumerate(self.groups):
            read = self.inputs.get(group[0].path)
            if read is None or number in routed:
                continue
            norm = made.get(identified(read))
            if norm is not None:
                self._keep({number: self._of_norm(norm, read.shape[-1])})
            self._keep_first(self._pairs(number))
        # All experts at once: each reads only its own products.
        every = {number: list(self._pairs(number)) for number in routed}
        for turn in range(max(map(len, every.values()), default=0)):
            self._keep(self._traced([pairs[turn] for n, pairs in every.items() if turn < len(pairs)]))
        return [self.found.get(number) for number in range(len(self.groups))]

    def _pairs(self, number: int) -> Iterator[_Pair]:
        """Parts of layers that ran before the group, the latest first; for an expert, only its own."""
        reader = self.groups[number][0]
        if number in self.found or reader.path not in self.inputs:
            return
        ran = list(self.inputs)
        for path in reversed(ran[: ran.index(reader.path)]):
            layer = self.layers[path]
            if layer.expert_number != reader.expert_number or layer.path in {one.path for one in self.groups[number]}:
                continue
            height = len(layer.weight)
            for place, count in _PARTS:
                if height % count == 0:
                    rows = slice(place * height // count, (place + 1) * height // count)
                    yield _Pair(number, reader, layer, rows)

    def _keep_first(self, pairs: Iterator[_Pair]) -> None:
        for pair in pairs:
            self._keep(self._traced([pair]))
            if pair.number in self.found:
                return

    def _of_norm(self, path: str, width: int) -> Source:
        module = self.block.get_submodule(path)
        named = dict(module.named_parameters(recurse=False))
        names = [".".join(part for part in (self.path, path, name) if part) for name in named]
        tensors = [part.data for part in named.values()]
        return Source(tensors, torch.arange(width), names, _narrow(tensors))

    def _keep(self, candidates: Mapping[int, Source]) -> None:
        """Keep those for which the block's output stays the same when factors are moved."""
        new = {number: source for number, source in candidates.items() if number not in self.found}
        if new and self._unchanged(new):
            self.found |= new
        elif len(new) > 1:
            for number, source in new.items():
                self._keep({number: source})

    def _unchanged(self, moved: Mapping[int, Source]) -> bool:
        draw = torch.Generator().manual_seed(0)
        touched = [tensor for source in moved.values() for tensor in source.tensors]
        touched += [layer.weight for number in moved for layer in self.groups[number]]
        with _restored(touched):
            for number, source in moved.items():
                powers = torch.randint(-_TRIED, _TRIED + 1, (source.entries,), generator=draw)
                factors = torch.exp2(powers.float())
                source.divide(factors[source.entry])
                _multiply(self.groups[number], factors[source.entry])
            outputs = [part for part in tree_leaves(self.run()) if isinstance(part, Tensor)]
        return len(outputs) == len(self.output) and all(map(torch.equal, outputs, self.output))

    def _traced(self, pairs: Sequence[_Pair]) -> dict[int, Source]:
        """The pairs whose layer produces the reader's inputs, each input from one row; all are tested at once."""
        halves = [torch.ones(pair.height, dtype=torch.int64) for pair in pairs]
        left = {
            pair.number: (pair, torch.zeros(0, dtype=torch.int64))
            for pair, powers in zip(pairs, self._powers(pairs, halves), strict=True)
            if powers is not None and bool(((powers == 1) | (powers < 0)).all()) and bool((powers == 1).any())
        }
        going = [pair for pair, _ in left.values()]
        digits = max((len(_digits(pair.height - 1)) for pair in going), default=0)
        entries = {pair.number: torch.zeros(pair.reader.weight.shape[1], dtype=torch.int64) for pair in going}
        failed: set[int] = set()
        for place in range(digits):
            spelled = [torch.arange(pair.height) // _BASE**place % _BASE for pair in going]
            for pair, powers in zip(going, self._powers(going, spelled), strict=True):
                if powers is None:
                    failed.add(pair.number)
                    continue
                known = (entries[pair.number] >= 0) & (powers >= 0)
                entries[pair.number] = torch.where(known, entries[pair.number] + powers * _BASE**place, -1)
        sources: dict[int, Source] = {}
        for pair in going:
            entry = _completed(entries[pair.number], pair.height)
            if pair.number not in failed and entry is not None:
                bias = [] if pair.made_by.bias is None else [f"{pair.made_by.path}.bias"]
                sources[pair.number] = Source(pair.tensors, entry, [pair.made_by.weight_name, *bias])
        return sources

    def _powers(self, pairs: Sequence[_Pair], halvings: Sequence[Tensor]) -> list[Tensor | None]:
        """How often each input is halved if rows are halved: int64 ``[in_features]``, -1 for inputs that are always
        zero.

        None where an input changes in any other way.
        """
        if not pairs:
            return []
        with _restored([tensor for pair in pairs for tensor in pair.tensors]):
            for pair, count in zip(pairs, halvings, strict=True):
                _divide(pair.tensors, torch.exp2(count.float()))
            seen, _ = self._observe()
        return [_halved(self.inputs[pair.reader.path], seen.get(pair.reader.path)) for pair in pairs]

    def _observe(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        outputs: list[Any] = []
        inputs, _ = reading(self.layers, lambda: outputs.append(self.run()))
        return inputs, [part for part in tree_leaves(outputs) if isinstance(part, Tensor)]

    @contextmanager
    def _norms(self, made: dict[tuple[Any, ...], str]) -> Iterator[None]:
        """Record which module made which tensor, if its parameters are vectors as long as the tensor's rows."""
        alive: list[Tensor] = []

        def after(path: str, width: int, _module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.shape[-1] == width:
                alive.append(output)  # kept alive, so that no address is used again
                made[identified(output.detach())] = path

        with ExitStack() as hooks:
            for path, module in self.block.named_modules():
                own = dict(module.named_parameters(recurse=False))
                vectors = {parameter.numel() for parameter in own.values()}
                if len(vectors) == 1 and "weight" in own and all(parameter.dim() == 1 for parameter in own.values()):
                    hooks.callback(module.register_forward_hook(partial(after, path, vectors.pop())).remove)
            yield


def _multiply(layers: Group, factors: Tensor) -> None:
    """Multiply the columns of these layers' weights, in place."""
    for layer in layers:
        layer.weight.mul_(factors.to(layer.weight))


def _divide(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Divide tensors along their first dimension, in place."""
    for tensor in tensors:
        tensor.div_(factors.to(tensor).view(-1, *[1] * (tensor.dim() - 1)))


def _narrow(tensors: Sequence[Tensor]) -> torch.dtype | None:
    """The narrow type in which a norm can stay exact; None if it has a bias, whose quotients would not be exact."""
    if len(tensors) > 1:
        return None
    narrow = (torch.bfloat16, torch.float16)
    return next((dtype for dtype in narrow if torch.equal(tensors[0].to(dtype).to(tensors[0]), tensors[0])), None)


@contextmanager
def _restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore the values of tensors."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, values in zip(tensors, before, strict=True):
            tensor.copy_(values)


def _halved(before: Tensor, after: Tensor | None) -> Tensor | None:
    """How often each input column was halved, -1 for columns of zeros; None if one changed in another way."""
    if after is None or after.shape != before.shape:
        return None
    old, new = before.flatten(0, -2).float(), after.flatten(0, -2).float()
    there = old != 0
    if not torch.equal(there, new != 0):
        return None
    ratios = torch.where(there, old / new, 0.0)
    ratio = ratios.amax(0)
    powers = ratio.clamp(min=1).log2().round()
    if not torch.equal(torch.where(there, torch.exp2(powers), 0.0), ratios):
        return None
    return torch.where(ratio > 0, powers, -1.0).long().cpu()


def _digits(number: int) -> list[int]:
    """The digits of a number in base 8, the lowest first."""
    digits = [number % _BASE]
    while number := number // _BASE:
        digits.append(number % _BASE)
    return digits


def _completed(entry: Tensor, height: int) -> Tensor | None:
    """The entry of each input, if some are unknown because these inputs are always zero on this text.

    They can be completed only if every other input is produced by the row of the same index; otherwise None.
    """
    known = entry >= 0
    if bool(known.all()):
        return entry if int(entry.max()) < height else None
    own = torch.arange(len(entry))
    return own if len(entry) == height and torch.equal(entry[known], own[known]) else None
