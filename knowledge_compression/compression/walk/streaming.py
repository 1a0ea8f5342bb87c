"""Compression of a checkpoint that does not fit in memory: from shards to shards, unit by unit.

A *unit* is a block of the network, or a target linear layer outside the blocks; everything else is the *rest*.
Only one unit's weights are in memory at a time (with a calibrated method, the rest and the activations too). A run that
was interrupted at any moment resumes after the last unit that was written and produces the same files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor, Tensor, nn

from knowledge_compression.compression.base import Compression, LayerByLayer, Shrinker
from knowledge_compression.compression.calibrated import Calibrated
from knowledge_compression.compression.layer_reports import CompressionReport, LayerReport
from knowledge_compression.errors import BadInput
from knowledge_compression.models import TargetLayer, Targets
from knowledge_compression.models.families import FINAL
from knowledge_compression.models.sharded import ShardedCopy
from knowledge_compression.models.soundness import check_finite
from knowledge_compression.models.streamed import StreamedModel
from knowledge_compression.progress import shown

log = logging.getLogger(__name__)

REST = "everything else"


def compress_streamed(
    compression: Compression, model: StreamedModel, targets: Targets, calibration: LongTensor | None, folder: Path
) -> CompressionReport:
    """Write a compressed copy of a model that stays on disk.

    The copy holds the same weights, bit for bit, as compressing the model in memory in its stored type and saving it.

    Args:
        compression: a method that works layer by layer or block by block and leaves linear layers linear layers.
        model: the model, whose weights are read from its folder.
        targets: the layers to compress.
        calibration: token ids ``[samples, length]`` where the method is calibrated.
        folder: where the copy is written; units that an earlier call finished there are kept.

    Raises:
        BadInput: the method cannot be streamed, or the disk is full.
    """
    if not isinstance(compression, LayerByLayer | Calibrated) or not compression.streams:
        raise BadInput(
            f"compression={compression.name} cannot be streamed; model.stream=true and device_map=auto take methods of "
            "one step that leave linear layers as they are, e.g. magnitude, rtn, gptq or sparsegpt"
        )
    if any(layer.role == FINAL for layer in targets):
        model.untie_head()
    stream = _Stream(compression, model, targets, folder)
    start = time.perf_counter()
    with torch.no_grad():
        stream.write_rest()
        if stream.pending:
            stream.compress(calibration)
        stream.write_untouched()
    stream.copy.finish(model)
    return stream.report(time.perf_counter() - start)


@dataclass
class _Stream:
    """One streamed compression."""

    compression: LayerByLayer | Calibrated[Any]
    model: StreamedModel
    targets: Targets
    folder: Path
    shrinker: Shrinker | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        blocks = self.model.architecture.block_paths(self.model.network)
        self.unit_of = {
            layer.path: next((block for block in blocks if layer.path.startswith(f"{block}.")), layer.path)
            for layer in self.targets
        }
        self.units = list(dict.fromkeys([*blocks, *self.unit_of.values()]))
        self.copy = ShardedCopy(self.folder, [REST, *self.units])
        self.notes = {unit: self.copy.note(unit) for unit in self.units if self.copy.is_finished(unit)}
        if self.notes:
            log.info("%d of %d blocks were finished by an earlier run", len(self.notes), len(self.units))
        self.pending = [layer for layer in self.targets if self.unit_of[layer.path] not in self.notes]

    def write_rest(self) -> None:
        """Copy the weights that belong to no unit."""
        names = self.model.names_outside(self.units)
        if self.model.network.config.tie_word_embeddings:  # a tied weight is stored once; see models.saving.full_state
            names = [name for name in names if self.model.source[name] == name]
        if not self.copy.is_finished(REST):
            self._write(REST, {name: self.model.read(name) for name in names}, None)

    def write_untouched(self) -> None:
        """Copy the blocks that hold no target and that no forward pass went through."""
        for unit in self.units:
            if not self.copy.is_finished(unit):
                with self.hold(unit, self.model.network.get_submodule(unit), {}):
                    pass

    def compress(self, calibration: LongTensor | None) -> None:
        """Compress the pending units, block by block on calibration text or, without it, layer by layer."""
        method = self.compression
        method.check(self.targets)
        if isinstance(method, LayerByLayer):
            finished = [self.unit_of[layer.path] for layer in self.targets if self.unit_of[layer.path] in self.notes]
            state = self.notes[finished[-1]].get("state") if finished else None
            self.shrinker = method.shrinker(self.targets, self._reading, state)
            self._layer_by_layer(self.shrinker)
        else:
            self._block_by_block(method, calibration)

    def _block_by_block(self, method: Calibrated[Any], calibration: LongTensor | None) -> None:
        blocks = self.model.architecture.block_paths(self.model.network)
        shared: dict[str, Tensor] = {}  # tied weights once
        for name in self.model.names_outside(blocks):
            source = self.model.source[name]
            shared.setdefault(source, self.model.read(name))
        resident = {name: shared[self.model.source[name]] for name in self.model.names_outside(blocks)}
        with self.model.holding(resident):
            method.apply(self.model, Targets(self.pending, self.model), calibration, hold=self.hold)

    def _layer_by_layer(self, shrinker: Shrinker) -> None:
        units = dict.fromkeys(self.unit_of[layer.path] for layer in self.pending)
        for unit in shown(units, "compressing"):
            reports: dict[str, LayerReport] = {}
            with self.hold(unit, self.model.network.get_submodule(unit), reports):
                reports |= {layer.path: shrinker(layer) for layer in self.pending if self.unit_of[layer.path] == unit}

    def _reading(self) -> Iterator[TargetLayer]:
        """Yield all targets, one at a time, each with its stored weights."""
        for name, layers in groupby(shown(self.targets, "ranking"), key=attrgetter("weight_name")):
            with self.model.holding({name: self.model.read(name)}):  # a bank of experts is loaded once for all of them
                yield from layers

    @contextmanager
    def hold(self, unit: str, module: nn.Module, reports: Mapping[str, LayerReport]) -> Iterator[None]:
        """Load a unit's weights into the network; on exit write the unit, unless it has been written already."""
        finished = self.copy.is_finished(unit)
        names = self.model.names_inside(unit)
        if finished:
            stored = self.copy.read(unit)
            weights = {name: self.model.assembled(name, stored.__getitem__) for name in names}
        else:
            weights = {name: self.model.read(name) for name in names}
            check_finite(weights.items(), self.model.name)
        with self.model.holding(weights):
            try:
                yield
                if not finished:
                    self._finish(unit, module, reports)
            finally:
                for part in module.modules():  # frees the codes, which are as large as the weight
                    part.__dict__.pop("quantized_weight", None)
                    part.__dict__.pop("notes_of_experts", None)

    def _finish(self, unit: str, module: nn.Module, reports: Mapping[str, LayerReport]) -> None:
        weights = {f"{unit}.{name}": tensor for name, tensor in module.state_dict().items()}
        done = [asdict(report) for path, report in reports.items() if self.unit_of[path] == unit]
        # Without the seconds, so that the same compression gives the same file.
        note: dict[str, Any] = {"layers": [layer | {"seconds": 0.0} for layer in done]}
        if self.shrinker is not None and self.shrinker.state is not None:
            note["state"] = self.shrinker.state
        self._write(unit, weights, note)
        self.notes[unit] = note | {"layers": done}

    def _write(self, unit: str, weights: Mapping[str, Tensor], note: Any) -> None:
        self.copy.write(unit, self.model.taken_apart(weights), note)

    def report(self, seconds: float) -> CompressionReport:
        """The report put together from the notes of all units, with this call's seconds."""
        parameters = {p.data_ptr() or id(p): p for p in self.model.network.parameters()}
        size = sum(p.numel() for p in parameters.values()) * self.model.stored.itemsize
        order = {layer.path: i for i, layer in enumerate(self.targets)}
        layers = [LayerReport(**layer) for note in self.notes.values() for layer in note["layers"]]
        return CompressionReport(
            method=self.compression.name,
            layers=sorted(layers, key=lambda layer: order[layer.path]),
            model_parameters=self.model.parameter_count(),
            model_bytes_before=size,
            model_bytes_after=size,
            seconds=seconds,
            forward_dtype=self.compression.multiplies_in(self.model),
        )
