"""The block-by-block walk under every calibrated method: inputs in, one block compressed, its outputs go on.

The network's own forward pass is run once for each batch of calibration text and *suspended* at every block (and at
every chosen linear that lies outside the blocks). While all batches stand before the same block, its linears' inputs
are observed, the block is compressed, and the batches go on with the compressed block's outputs. Whatever a network
does between its blocks (masks, positions, rotary embeddings, the way from encoder to decoder) is thus done by the
network itself, and nothing here knows an architecture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import LongTensor, Tensor, nn
from torch.utils._pytree import tree_map_only

from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.walk.layer_inputs import finite, first_tensor, reading, sharing
from knowledge_compression.compression.walk.suspended import SuspendedForward, marked
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Targets
from knowledge_compression.models.device import Device, multiplied_in
from knowledge_compression.models.families import DECODER, ENCODER
from knowledge_compression.models.targets import TargetLayer
from knowledge_compression.progress import bars

TOKENS_PER_BATCH = 4096
TOKENS_PER_BATCH_CPU = 1024  # as fast there, and what a forward pass leaves in between is less


@dataclass(frozen=True)
class LayerInputs:
    """What one batch brings to a layer.

    Attributes:
        values: the inputs ``[tokens, in_features]`` in the precision of the forward pass, on the compute device.
        influence: how far an error in the layer's output at each token moves the output of its block, relative to that
            output's size, summed over the linears that read the tensor; float32 ``[tokens]``, None unless asked for.
    """

    values: Tensor
    influence: Tensor | None = None


class Statistics(ABC):
    """What a method keeps of a layer's inputs; one is made for all linears that read the same tensor."""

    @abstractmethod
    def update(self, inputs: LayerInputs) -> None:
        """Take in one batch."""

    @property
    def second_moments(self) -> Tensor | None:
        """``mean of x xᵀ``, float32 ``[in_features, in_features]``, where it is kept: it tells output errors."""
        return None


S = TypeVar("S", bound=Statistics)


class BlockMethod(Protocol[S]):
    """What a calibrated method gives to :func:`compress_blocks`."""

    def observe(self, in_features: int, device: torch.device) -> S:
        """Empty statistics for inputs of this width."""
        ...

    def shrink(self, layers: Sequence[TargetLayer], statistics: S) -> list[LayerReport]:
        """Compress, in place, linears that read the same inputs; may also put other modules in their places.

        Returns:
            One report for each layer, in their order.
        """
        ...


@dataclass(frozen=True)
class WalkSettings:
    """How a walk goes through the blocks.

    Attributes:
        true_sequential: observe and compress the linears of a block in the order in which they run, each on what those
            before it now give; then every linear is run only once. Else all are observed on the block as it was. A
            block that is used many times is always observed whole.
        by_influence: tell the method, too, how far an error at each token moves the block's output (one backward pass
            through each block, which must be whole).
        device: where blocks are computed, one at a time, e.g. ``cuda:0``; None where they lie.
        forward_dtype: type of the products in the forward passes of a float32 network: ``auto`` (see
            ``models.device``), ``bfloat16`` or ``float32``.
    """

    true_sequential: bool = False
    by_influence: bool = False
    device: str | None = None
    forward_dtype: str = "auto"

    def computed_on(self, model: Model) -> Device:
        """Where blocks are computed."""
        return Device.named(self.device) if self.device else Device.of(model.device)

    def multiplied_in(self, model: Model) -> torch.dtype | None:
        """The type of the forward passes' products, None for the network's own.

        Raises:
            BadInput: there is no such choice.
        """
        return self.computed_on(model).product_dtype(self.forward_dtype, model.dtype, "compression.forward_dtype")

    @property
    def text_passes(self) -> int:
        """How often the calibration text runs through each block, which is what a forecast counts."""
        if self.true_sequential:
            return 1  # every linear is compressed on the way
        return 3 if self.by_influence else 2  # to observe, perhaps backwards too, and with what came of it


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
    """Compress the target layers block by block, each on the inputs that the compressed blocks before it give.

    A block that is used many times (ALBERT) is observed over all its uses and compressed after the last.

    Args:
        model: the model; its network is changed in place.
        targets: the layers to compress; a block with none of them is only run.
        calibration: token ids ``[samples, length]``. An encoder-decoder reads the first half of each window and its
            decoder says the second.
        method: what to observe and what to do with it. Whatever type the forward passes multiply in, it is called
            outside that context, so its own products are what they look like.
        settings: how to walk.
        hold: brings a block to the compute device and back; by default its parameters are moved.
        tokens_per_batch: tokens in one forward pass; 1,024 on a CPU and 4,096 elsewhere if None.

    Returns:
        One report for each target layer, in forward order.

    Raises:
        BadInput: no calibration text, windows longer than the model's positions, a target that never runs, or
            ``by_influence`` together with ``true_sequential``.
    """
    if settings.by_influence and settings.true_sequential:
        raise BadInput(
            "compression.by_influence=true looks at whole blocks and compression.true_sequential=true never does; "
            "set one of them to false"
        )
    windows = _checked(model, calibration)
    place, narrower = settings.computed_on(model).place, settings.multiplied_in(model)
    walk = _Walk(model, targets, method, settings, place, narrower, hold or partial(_moved, device=place))
    # The first batch is one window, which shows at little cost what reads what.
    tokens = tokens_per_batch or (TOKENS_PER_BATCH_CPU if place.type == "cpu" else TOKENS_PER_BATCH)
    rest = windows[1:].split(max(1, tokens // windows.shape[1]))
    with torch.no_grad():
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


def _checked(model: Model, calibration: LongTensor | None) -> Tensor:
    if calibration is None or calibration.numel() == 0:
        raise BadInput("there is no calibration text; choose one with corpus=c4, wikitext, text or self")
    length = calibration.shape[1]
    if model.max_positions is not None and length > model.max_positions:
        raise BadInput(
            f"calibration windows of {length} tokens do not fit {model.name}'s {model.max_positions} positions; "
            f"choose corpus.length={model.max_positions} or less"
        )
    return calibration


@dataclass
class _Group(Generic[S]):
    """Linears of a block that read the same tensor, with its statistics; the first of them observes for all."""

    statistics: S
    layers: list[TargetLayer] = field(default_factory=list)


@dataclass
class _Walk(Generic[S]):
    """The state of one walk through the network.

    A *unit* is a block, or a target linear outside the blocks; forward passes are suspended before each.
    """

    model: Model
    targets: Targets
    method: BlockMethod[S]
    settings: WalkSettings
    device: torch.device
    narrower: torch.dtype | None  # of the forward passes' products, if not the network's own
    hold: Hold

    def __post_init__(self) -> None:
        self.network = self.model.network
        self.units = self.model.architecture.block_paths(self.network)
        self.pending: dict[str, list[TargetLayer]] = {}
        for layer in self.targets:
            unit = next((path for path in self.units if layer.path.startswith(f"{path}.")), layer.path)
            self.pending.setdefault(unit, []).append(layer)
        self.units += [unit for unit in self.pending if unit not in self.units]
        self.reports: dict[str, LayerReport] = {}

    def run(self, batches: Sequence[Tensor]) -> list[LayerReport]:
        """Walk until every target is compressed; more than once only where a block is used many times."""
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
        return list(self.reports.values())

    def _pass(self, batches: Sequence[Tensor]) -> Iterator[str]:
        """Run all batches abreast until nothing is pending, or a block used many times has been compressed."""
        groups: dict[str, list[_Group[S]]] = defaultdict(list)
        calls: Counter[str] = Counter()
        forwards = [SuspendedForward(partial(self._forward, batch), self._multiplying) for batch in batches]
        with marked(self.network, self.units):
            try:
                for forward in forwards:
                    forward.resume()
                while unit := forwards[0].unit:
                    with self.hold(unit, self.network.get_submodule(unit), self.reports):
                        uses = max((layer.uses for layer in self.pending.get(unit, ())), default=1)
                        if unit in self.pending and self.settings.true_sequential and uses == 1:
                            self._one_by_one(unit, forwards)
                            yield unit
                            if self.pending:
                                continue
                            return
                        if unit in self.pending:
                            self._observe(unit, forwards, groups[unit])
                            calls[unit] += 1
                            if calls[unit] == uses:
                                self._compress(unit, groups.pop(unit))
                                if uses > 1:  # its earlier uses must be run anew
                                    return
                        yield unit
                        if not self.pending:
                            return
                        for forward in forwards:
                            with self._multiplying():
                                output = self._run(self.network.get_submodule(unit), forward)
                            forward.give(output)
                for unit, seen in groups.items():  # used less often than the configuration says
                    with self.hold(unit, self.network.get_submodule(unit), self.reports):
                        self._compress(unit, seen)
            finally:
                for forward in forwards:
                    forward.cancel()

    def _multiplying(self) -> AbstractContextManager[Any]:
        """Lies around every forward pass and nothing else: what a method computes is not narrowed."""
        return multiplied_in(self.narrower, self.device)

    def _forward(self, ids: Tensor) -> None:
        ids = ids.to(self.model.device)
        if self.model.family == ENCODER:
            self.network(input_ids=ids)
        elif self.model.family == DECODER:
            self.network(input_ids=ids, use_cache=False)
        else:
            text, said = ids.tensor_split(2, dim=1)
            start = torch.full_like(said[:, :1], self.network.config.decoder_start_token_id)
            said = torch.cat([start, said[:, :-1]], dim=1)
            self.network(input_ids=text, decoder_input_ids=said, use_cache=False)

    def _run(self, module: Callable[..., Any], forward: SuspendedForward) -> Any:
        """Call the module, before which ``forward`` is suspended, with its own arguments, on the compute device."""
        home = first_tensor(forward.args, forward.kwargs).device
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(self.device), (forward.args, forward.kwargs))
        return tree_map_only(Tensor, lambda t: t.to(home), module(*args, **kwargs))

    def _one_by_one(self, unit: str, forwards: Sequence[SuspendedForward]) -> None:
        """Run all batches through the unit, stopping before each linear to compress it on what it is about to read.

        Batches may take different ways through the unit (experts): whoever stands before the first layer goes on.
        """
        layers = {layer.path: layer for layer in self.pending[unit]}
        inputs, _ = self._read(unit, forwards[0])
        together = {path: group for group in sharing(inputs) for path in group}
        order = {path: place for place, path in enumerate(dict.fromkeys([*inputs, *layers]))}
        del inputs  # what they read is looked at no more
        done_with_another = {path for path, group in together.items() if path != group[0]}
        with marked(self.network, [path for path in layers if path != unit and path not in done_with_another]):
            moving = [] if unit in layers else list(forwards)
            while True:
                for forward in moving:
                    forward.resume(partial(self._run, forward=forward))
                path = min((f.unit for f in forwards if f.unit in order), key=order.__getitem__, default=None)
                if path is None:
                    break
                moving = [forward for forward in forwards if forward.unit == path]
                if path not in self.reports:
                    group = together.get(path, [path])
                    statistics = self.method.observe(layers[path].weight.shape[1], self.device)
                    for forward in moving:
                        values = finite(path, first_tensor(forward.args, forward.kwargs))
                        statistics.update(LayerInputs(values.to(self.device).flatten(0, -2)))
                    self._shrink(_Group(statistics, [layers[member] for member in group]))
                    if len(self.reports) == len(self.targets):
                        break
        self._finish(unit)

    def _observe(self, unit: str, forwards: Sequence[SuspendedForward], groups: list[_Group[S]]) -> None:
        """Run all batches through the unit; its groups, which the first batch finds, take in their inputs."""
        layers = {layer.path: layer for layer in self.pending[unit]}
        for forward in forwards:
            inputs, influence = self._read(unit, forward)  # in the order in which the layers ran
            known = {layer.path for group in groups for layer in group.layers}
            for paths in sharing({path: values for path, values in inputs.items() if path not in known}):
                width = inputs[paths[0]].shape[-1]
                groups.append(_Group(self.method.observe(width, self.device), [layers[path] for path in paths]))
            for group in groups:
                first = group.layers[0].path
                if first not in inputs:
                    continue
                values = finite(first, inputs[first]).flatten(0, -2)
                shares = [influence[layer.path] for layer in group.layers] if self.settings.by_influence else []
                group.statistics.update(LayerInputs(values, torch.stack(shares).sum(dim=0) if shares else None))

    def _read(self, unit: str, forward: SuspendedForward) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the unit; what each of its pending layers read and, where wanted, the influence of each token."""
        run = partial(self._run, self.network.get_submodule(unit), forward)
        layers = {layer.path: layer.module for layer in self.pending[unit]}
        with self._multiplying():
            return reading(layers, run, by_influence=self.settings.by_influence)

    def _shrink(self, group: _Group[S]) -> None:
        for report in self.method.shrink(group.layers, group.statistics):
            self.reports[report.path] = report

    def _compress(self, unit: str, groups: Sequence[_Group[S]]) -> None:
        for group in groups:
            self._shrink(group)
        self._finish(unit)

    def _finish(self, unit: str) -> None:
        """Strike the unit off the list."""
        if missing := [layer.path for layer in self.pending.pop(unit) if layer.path not in self.reports]:
            raise BadInput(f"the forward pass on calibration text never runs {', '.join(missing)}")
