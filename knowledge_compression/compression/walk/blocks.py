"""The block-by-block walk of every calibrated method: observe a block's inputs, compress it, pass its outputs on.

The network's own forward pass is run once for each batch of calibration text and *suspended* at every block (and at
every chosen linear that lies outside the blocks). While all batches are suspended before the same block, its linears'
inputs are observed, the block is compressed, and the batches resume with the compressed block's outputs. Whatever a
network does between its blocks (masks, positions, rotary embeddings, passing from encoder to decoder) is thus done by
the network itself, and nothing here depends on an architecture.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic

import torch
from torch import LongTensor, Tensor, nn
from torch.utils._pytree import tree_map_only

from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.walk.beside import Beside, beside, hidden_of
from knowledge_compression.compression.walk.expert_inputs import one_expert_after_the_other
from knowledge_compression.compression.walk.groups import Group
from knowledge_compression.compression.walk.layer_inputs import finite, first_tensor, reading, sharing
from knowledge_compression.compression.walk.passes import (
    TOKENS_PER_BATCH,
    TOKENS_PER_BATCH_CPU,
    checked_windows,
    read_text,
)
from knowledge_compression.compression.walk.statistics import (
    BlockMethod,
    LayerInputs,
    Observed,
    S,
    Statistics,
    WalkSettings,
)
from knowledge_compression.compression.walk.suspended import SuspendedForward, marked
from knowledge_compression.compression.walk.tuning import Call, CompressedBlock
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Targets
from knowledge_compression.models.device import multiplied_in
from knowledge_compression.models.targets import TargetLayer
from knowledge_compression.progress import bars

__all__ = ["BlockMethod", "LayerInputs", "Statistics", "WalkSettings", "compress_blocks"]
DEFAULT_WALK = WalkSettings()

# Brings a block (its module path and module) to where it is computed for as long as the context is open; the reports,
# by layer path, are those of all layers compressed so far, and grow while it is open.
Hold = Callable[[str, nn.Module, Mapping[str, LayerReport]], AbstractContextManager[None]]


def compress_blocks(
    model: Model,
    targets: Targets,
    calibration: LongTensor | None,
    method: BlockMethod[S],
    settings: WalkSettings = DEFAULT_WALK,
    *,
    hold: Hold | None = None,
    tokens_per_batch: int | None = None,
) -> list[LayerReport]:
    """Compress the target layers block by block, each on the inputs that it gets from the compressed blocks before it.

    A block that is used several times (ALBERT) is observed over all its uses and compressed after the last.

    Args:
        model: the model; its network is changed in place.
        targets: the layers to compress; a block without any is only run.
        calibration: token ids ``[samples, length]``. In an encoder-decoder, the encoder reads the first half of each
            window and the decoder the second.
        method: what to observe and how to compress. It is called outside the forward passes' autocast context, so its
            own products are computed in the dtype of their operands.
        settings: how to walk.
        hold: brings a block to the compute device and back; by default its parameters are moved.
        tokens_per_batch: tokens in one forward pass; 1,024 on a CPU and 4,096 elsewhere if None.

    Returns:
        One report for each target layer, in forward order.

    Raises:
        BadInput: no calibration text, windows longer than the model's positions, a target that the forward pass never
            reaches, or ``by_influence`` together with ``true_sequential``.
    """
    if settings.by_influence and settings.true_sequential:
        raise BadInput(
            "compression.by_influence=true needs whole blocks, which compression.true_sequential=true never runs; "
            "set one of them to false"
        )
    windows = checked_windows(model, calibration)
    place, narrower = settings.computed_on(model).place, settings.multiplied_in(model)
    walk = _Walk(model, targets, method, settings, place, narrower, hold or partial(_moved, device=place))
    # The first batch is one window, which shows cheaply which linears read the same tensor.
    tokens = tokens_per_batch or (TOKENS_PER_BATCH_CPU if place.type == "cpu" else TOKENS_PER_BATCH)
    rest = windows[1:].split(max(1, tokens // windows.shape[1]))
    with torch.no_grad(), one_expert_after_the_other(model.network):
        return walk.run([windows[:1], *(batch for batch in rest if len(batch))])


@contextmanager
def _moved(
    _path: str, block: nn.Module, _reports: Mapping[str, LayerReport], *, device: torch.device
) -> Iterator[None]:
    home = next((tensor.device for tensor in block.parameters()), device)
    block.to(device)
    try:
        yield
    finally:
        block.to(home)


@dataclass(frozen=True)
class _Arguments:
    """The arguments of one call of a unit, which outlive the pass that made the call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Walk(Generic[S]):
    """The state of one walk through the network.

    A *unit* is a block, or a target linear outside the blocks; forward passes are suspended before each unit.
    """

    model: Model
    targets: Targets
    method: BlockMethod[S]
    settings: WalkSettings
    device: torch.device
    narrower: torch.dtype | None  # dtype of the products in forward passes, if not the network's own
    hold: Hold

    def __post_init__(self) -> None:
        self.network = self.model.network
        self.units = self.model.architecture.block_paths(self.network)
        self.pending: dict[str, list[TargetLayer]] = {}
        for layer in self.targets:
            unit = next((path for path in self.units if layer.path.startswith(f"{path}.")), layer.path)
            self.pending.setdefault(unit, []).append(layer)
        self.blocks = frozenset(self.units)
        self.units += [unit for unit in self.pending if unit not in self.units]
        self.reports: dict[str, LayerReport] = {}

    def run(self, batches: Sequence[Tensor]) -> list[LayerReport]:
        """Walk until every target is compressed; more than once only if a block is used several times."""
        total = sum(map(len, self.pending.values()))
        with bars() as progress:
            bar = progress.add_task("compressing", total=total)
            while self.pending:
                before = len(self.reports)
                for _ in self._pass(batches):
                    progress.update(bar, completed=len(self.reports))
                if len(self.reports) == before:
                    missing = ", ".join(layer.path for layers in self.pending.values() for layer in layers)
                    raise BadInput(f"the forward pass of {self.model.name} on calibration text never runs {missing}")
        return [self.reports[layer.path] for layer in self.targets]  # experts without tokens come last in the walk

    def _pass(self, batches: Sequence[Tensor]) -> Iterator[str]:
        """Run all batches in step until nothing is pending or a block that is used several times is compressed."""
        groups: dict[str, list[Group[S]]] = defaultdict(list)
        calls: Counter[str] = Counter()
        calls_of: dict[str, list[Call]] = defaultdict(list)
        forwards = [SuspendedForward(partial(self._forward, batch), self._multiplying) for batch in batches]
        twins = [SuspendedForward(partial(self._forward, batch), self._multiplying) for batch in batches]
        twins = twins if self.settings.beside else []  # the same text in the uncompressed network
        with marked(self.network, self.units):
            try:
                for forward in [*forwards, *twins]:
                    forward.resume()
                while unit := forwards[0].unit:
                    with self.hold(unit, self.network.get_submodule(unit), self.reports):
                        uses = max((layer.uses for layer in self.pending.get(unit, ())), default=1)
                        dense = [self._beside(unit, twin) for twin in twins]
                        if unit in self.pending and self.settings.true_sequential and uses == 1:
                            self._one_by_one(unit, forwards, dense)
                            yield unit
                            if self.pending:
                                continue
                            return
                        if unit in self.pending:
                            self._observe(unit, forwards, dense, groups[unit])
                            calls_of[unit] += self._calls(unit, forwards, dense)
                            calls[unit] += 1
                            if calls[unit] == uses:
                                seen = groups.pop(unit)
                                self._prepare(unit, seen, forwards[0])
                                self._compress(unit, seen, calls_of.pop(unit))
                                if uses > 1:  # its earlier uses must be run again
                                    return
                        yield unit
                        if not self.pending:
                            return
                        for forward in forwards:
                            with self._multiplying():
                                output = self._run(self.network.get_submodule(unit), forward)
                            forward.give(output)
                for unit, seen in groups.items():  # used fewer times than the configuration states
                    with self.hold(unit, self.network.get_submodule(unit), self.reports):
                        self._compress(unit, seen, calls_of.pop(unit))
            finally:
                for forward in [*forwards, *twins]:
                    forward.cancel()

    def _multiplying(self) -> AbstractContextManager[Any]:
        """The context of every forward pass and of nothing else: a method's own products keep their dtype."""
        return multiplied_in(self.narrower, self.device)

    def _forward(self, ids: Tensor) -> None:
        read_text(self.model, ids)

    def _run(self, module: Callable[..., Any], forward: SuspendedForward | _Arguments) -> Any:
        """Call the module before which ``forward`` is suspended, with that pass's arguments, on the compute device."""
        home = first_tensor(forward.args, forward.kwargs).device
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(self.device), (forward.args, forward.kwargs))
        return tree_map_only(Tensor, lambda t: t.to(home), module(*args, **kwargs))

    def _beside(self, unit: str, twin: SuspendedForward) -> Beside:
        """Run the unit, which is not compressed yet, in a pass through the uncompressed network."""
        layers = {layer.path: layer for layer in self.pending.get(unit, ())}
        with self._multiplying():
            run = partial(self._run, self.network.get_submodule(unit), twin)
            kept, output = beside(layers, run, inputs=self.settings.dense_inputs)
        twin.give(output)
        return kept

    def _calls(self, unit: str, forwards: Sequence[SuspendedForward], dense: Sequence[Beside]) -> list[Call]:
        """The unit's calls on all batches, if it is a block to be tuned."""

        def run(call: _Arguments) -> Tensor:
            with self._multiplying():
                return hidden_of(self._run(self.network.get_submodule(unit), call))

        if not self.settings.tuned_tokens or unit not in self.blocks:
            return []
        calls = [_Arguments(forward.args, forward.kwargs) for forward in forwards]
        return [Call(partial(run, call), one.output) for call, one in zip(calls, dense, strict=True)]

    def _one_by_one(self, unit: str, forwards: Sequence[SuspendedForward], dense: Sequence[Beside]) -> None:
        """Run all batches through the unit, stopping before each linear to compress it on the inputs that it is about
        to read.

        Batches may take different paths through the unit (experts): those suspended at the earliest layer resume first.
        """
        layers = {layer.path: layer for layer in self.pending[unit]}
        inputs, _ = self._read(unit, forwards[0])
        together = {path: group for group in sharing(inputs) for path in group}
        ran = dict.fromkeys([*inputs, *layers])  # in this order
        del inputs  # their inputs are no longer observed
        stops: dict[str, list[TargetLayer]] = {}
        for path in ran:
            stops.setdefault(layers[path].holder, []).append(layers[path])
        order = {path: place for place, path in enumerate(stops)}
        of_pass = {id(forward): one for forward, one in zip(forwards, dense, strict=False)}
        done_with_another = {path for path, group in together.items() if path != group[0] and not layers[path].expert}
        with marked(self.network, [path for path in stops if path != unit and path not in done_with_another]):
            moving = [] if unit in layers else list(forwards)
            while True:
                for forward in moving:
                    forward.resume(partial(self._run, forward=forward))
                stop = min((f.unit for f in forwards if f.unit in order), key=order.__getitem__, default=None)
                if stop is None:
                    break
                moving = [forward for forward in forwards if forward.unit == stop]
                if stops[stop][0].path in self.reports:
                    continue
                if stops[stop][0].expert:
                    self._bank(stop, moving, stops[stop])
                else:
                    group = Group(self.method.observe(layers[stop].weight.shape[1], self.device))
                    group.layers = [layers[member] for member in together.get(stop, [stop])]
                    for forward in moving:
                        values = finite(stop, first_tensor(forward.args, forward.kwargs))
                        there = of_pass[id(forward)].of(stop, values) if dense else None
                        group.statistics.update(self._inputs(values.to(self.device), None, there))
                        group.tokens += values.numel() // values.shape[-1]
                    self._shrink(group)
                if len(self.reports) == len(self.targets):
                    break
        self._finish(unit)

    def _bank(self, path: str, forwards: Sequence[SuspendedForward], layers: Sequence[TargetLayer]) -> None:
        """Compress the experts of the bank before which the passes are suspended, one tensor of the bank at a time."""
        run = partial(self._run, self.network.get_submodule(path))
        for name in dict.fromkeys(layer.weight_name for layer in layers):
            part = {layer.path: layer for layer in layers if layer.weight_name == name}
            width = next(iter(part.values())).weight.shape[1]
            groups = {path: Group(self.method.observe(width, self.device), [layer]) for path, layer in part.items()}
            for forward in forwards:
                with self._multiplying():
                    inputs, _ = reading(part, partial(run, forward))
                for expert, values in inputs.items():
                    groups[expert].statistics.update(self._inputs(finite(expert, values), None, None))
                    groups[expert].tokens += len(values)
            for group in groups.values():
                self._shrink(group)

    def _inputs(self, values: Tensor, influence: Tensor | None, dense: Tensor | None) -> LayerInputs:
        """The inputs of one batch ``[..., in_features]`` in the form that is passed to the method."""
        flat = None if dense is None else dense.flatten(0, -2)
        return LayerInputs(values.flatten(0, -2), influence, flat, self.narrower)

    def _observe(
        self, unit: str, forwards: Sequence[SuspendedForward], dense: Sequence[Beside], groups: list[Group[S]]
    ) -> None:
        """Run all batches through the unit; its groups, found in the first batch, observe their inputs."""
        layers = {layer.path: layer for layer in self.pending[unit]}
        for i, forward in enumerate(forwards):
            inputs, influence = self._read(unit, forward)  # in the order in which the layers ran
            known = {layer.path for group in groups for layer in group.layers}
            for paths in sharing({path: values for path, values in inputs.items() if path not in known}):
                width = inputs[paths[0]].shape[-1]
                groups.append(Group(self.method.observe(width, self.device), [layers[path] for path in paths]))
            for group in groups:
                first = group.layers[0].path
                if first not in inputs:
                    continue
                values = finite(first, inputs[first])
                shares = [influence[layer.path] for layer in group.layers] if self.settings.by_influence else []
                together = torch.stack(shares).sum(dim=0) if shares else None
                there = dense[i].of(first, values) if dense else None
                group.statistics.update(self._inputs(values, together, there))
                group.tokens += values.numel() // values.shape[-1]

    def _read(self, unit: str, forward: SuspendedForward) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the unit; return the inputs of its pending layers and, if wanted, the influence of each token."""
        run = partial(self._run, self.network.get_submodule(unit), forward)
        layers = {layer.path: layer for layer in self.pending[unit]}
        with self._multiplying():
            return reading(layers, run, by_influence=self.settings.by_influence)

    def _prepare(self, unit: str, groups: Sequence[Group[S]], forward: SuspendedForward) -> None:
        """Let the method change the block before any of its layers is compressed."""
        module = self.network.get_submodule(unit)

        def run() -> Any:
            with self._multiplying():
                return self._run(module, forward)

        for group in groups:
            group.settle(self._empty, by_influence=self.settings.by_influence)
        self.method.prepare(Observed(unit, module, [(group.layers, group.statistics) for group in groups], run))

    def _empty(self, width: int) -> S:
        return self.method.observe(width, self.device)

    def _shrink(self, group: Group[S]) -> None:
        group.settle(self._empty, by_influence=self.settings.by_influence)
        few = group.few
        for report in self.method.shrink(group.layers, group.statistics):
            if group.routed or few:
                report.tokens = group.tokens
            if few:
                report.fallbacks.append("few_tokens" if group.tokens else "no_tokens")
            self.reports[report.path] = report

    def _compress(self, unit: str, groups: Sequence[Group[S]], calls: Sequence[Call]) -> None:
        layers = self.pending[unit]
        dense = {layer.path: layer.weight.clone() for layer in layers} if calls else {}
        for group in groups:
            self._shrink(group)
        self._finish(unit)
        if calls:
            moments = {x.path: m for g in groups for x in g.layers if (m := g.statistics.second_moments) is not None}
            self.method.tune(CompressedBlock(unit, layers, dense, moments, self.reports, calls))

    def _finish(self, unit: str) -> None:
        """Mark the unit as done; layers that ran in none of its passes are compressed without statistics.

        Those are experts to which the router sent no token, and layers for tokens that the text does not have (LED's
        global attention).
        """
        for layer in self.pending.pop(unit):
            if layer.path not in self.reports:
                self._shrink(Group(self.method.observe(layer.weight.shape[1], self.device), [layer]))
