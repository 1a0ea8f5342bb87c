"""Bits or sparsity by each layer's measured error: the choice with the least total error within the budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knowledge_compression.cache import cache_folder, locked
from knowledge_compression.compression.allocation.base import BITS, Allocation, Budget, Chosen, set_to, to_the_weight
from knowledge_compression.compression.base import LayerByLayer, Method
from knowledge_compression.compression.calibrated import Calibrated
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.hessian import Hessian, relative_errors
from knowledge_compression.compression.solve.knapsack import least_harm
from knowledge_compression.compression.walk.statistics import BlockMethod, LayerInputs, Statistics, WalkSettings
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.identity import digest_of, identity
from knowledge_compression.models import Model, TargetLayer, Targets
from knowledge_compression.models.soundness import weights_of

if TYPE_CHECKING:
    from torch import LongTensor

_FINER = 0.02  # steps of sparsity between those that are measured
VERSION = 1  # raised whenever a change of the code changes the measurements


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Allocation):
    """Measure the error of each layer at each value, and take the values with the least total relative output error.

    Every layer is compressed by the method at every value, on the inputs that it has in the dense model, and restored.
    Its error is that of its output on the calibration text, relative to the output. The values with the least sum of
    errors within the budget are found exactly (multiple-choice knapsack). Sparsities are measured in steps of 0.1
    around the budget, up to 0.2 from it, and interpolated between these. The measurements of each layer are stored at
    once, so that an interrupted search resumes where it was.
    """

    name = "sensitivity"
    measures = True

    def choose(
        self, method: Method, budget: Budget, model: Model, targets: Targets, calibration: LongTensor | None
    ) -> Chosen:
        """Measure, then solve."""
        at = {_key(value): set_to(method, budget.kind, value) for value in self.options(budget)}
        measured, tokens = self.measure(at, model, targets, calibration)
        return Chosen(self.least(self.harms(measured), method, budget, targets), measured, tokens)

    def measure(
        self, at: Mapping[str, Method], model: Model, targets: Targets, calibration: LongTensor | None
    ) -> tuple[dict[str, Any], int]:
        """What the choice is based on, JSON-ready, and how many tokens were read for it.

        Args:
            at: the method with each value, by the value's name.
            model, targets, calibration: as in :meth:`choose`.
        """
        errors = measured_errors(at, model, targets, calibration)
        return {"errors": errors}, 0 if calibration is None else calibration.numel()

    def harms(self, measured: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
        """What the sum over the layers is taken of: by layer, then by value."""
        errors: Mapping[str, Mapping[str, float]] = measured["errors"]
        return errors

    def least(
        self,
        harms: Mapping[str, Mapping[str, float]],
        method: Method,
        budget: Budget,
        targets: Sequence[TargetLayer],
    ) -> Mapping[str, float]:
        """The values with the least total harm.

        Args:
            harms: by layer, then by value.
            method, budget, targets: as in :meth:`choose`.
        """
        options = self.options(budget)
        measured = [[harms[layer.path][_key(value)] for value in options] for layer in targets]
        if budget.kind == BITS:
            choices = measured
        else:
            finer = np.unique(np.round(np.arange(options[0], options[-1] + 1e-9, _FINER), 6))
            choices = [list(np.interp(finer, options, np.maximum.accumulate(of_layer))) for of_layer in measured]
            options = [float(value) for value in finer]
        costs = [[self.cost(method, budget.kind, layer, value) for value in options] for layer in targets]
        chosen = least_harm(choices, costs, budget.total)
        if chosen is None:
            raise self.refuse(budget, method, targets)
        values = {layer.path: options[choice] for layer, choice in zip(targets, chosen, strict=True)}
        return values if budget.kind == BITS else to_the_weight(values, targets, budget.total)


def _key(value: float) -> str:
    return f"{value:g}"


def measured_errors(
    at: Mapping[str, Method], model: Model, targets: Targets, calibration: LongTensor | None
) -> dict[str, dict[str, float]]:
    """The relative output error of each layer under each of several settings of a method; the model is unchanged.

    Args:
        at: the method with each setting, by the name of the setting.
        model, targets, calibration: as in :meth:`Compression.compress`.

    Returns:
        Errors by layer path, then by setting.
    """
    from knowledge_compression.compression.walk.blocks import compress_blocks

    method = next(iter(at.values()))
    if method.modules:
        raise BadInput(
            "this allocation compresses layers and restores them, which is not possible with "
            f"compression={method.name}; choose allocation=uniform"
        )
    kept = Kept.of([identity(one) for one in at.values()], model, calibration)
    pending = [layer for layer in targets if layer.path not in kept.found]
    if pending:
        settings = method.walk if isinstance(method, Calibrated) else WalkSettings(true_sequential=True)
        compress_blocks(model, Targets(pending, model), calibration, _Measuring(method, at, kept.add), settings)
    return {layer.path: kept.found[layer.path] for layer in targets}


@dataclass(frozen=True)
class Kept:
    """The measurements so far, in the cache.

    Attributes:
        file: where they are kept.
        found: by layer path, then by what was measured.
    """

    file: Path
    found: dict[str, dict[str, float]]

    @classmethod
    def of(cls, what: Any, model: Model, calibration: LongTensor | None) -> Kept:
        """Those of this model and text.

        Args:
            what: plain data on how they are measured.
            model, calibration: as in :meth:`Compression.compress`.
        """
        import hashlib

        sha = hashlib.sha256()
        for name, tensor in weights_of(model):
            sha.update(name.encode())
            sha.update(tensor.contiguous().cpu().view(torch.uint8).numpy())  # type: ignore[arg-type]
        if calibration is not None:
            sha.update(calibration.numpy().tobytes())
        name = digest_of([VERSION, what, sha.hexdigest(), model.device.type])
        file = cache_folder() / "allocations" / f"{name}.jsonl"
        return cls(file, _read(file))

    def add(self, path: str, errors: dict[str, float]) -> None:
        """Keep those of one more layer, whole or not at all, with those of other runs that measure the same now."""
        with locked(self.file):
            self.found.update(_read(self.file) | {path: errors})
            whole = "".join(json.dumps({one: values}) + "\n" for one, values in self.found.items())
            scratch = self.file.with_suffix(".partial")
            scratch.write_text(whole, encoding="utf-8")
            scratch.replace(self.file)


def _read(file: Path) -> dict[str, dict[str, float]]:
    """The measurements in a file; none if it does not exist."""
    found: dict[str, dict[str, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found |= json.loads(line)
        except ValueError:  # the file was damaged
            break
    return found


class _Both(Statistics):
    """The second moments, by which errors are measured, and the method's own statistics of the inputs."""

    def __init__(self, moments: Hessian, own: Statistics) -> None:
        self.moments, self.own = moments, own

    def update(self, inputs: LayerInputs) -> None:
        self.moments.update(LayerInputs(inputs.values, narrower=inputs.narrower))
        self.own.update(inputs)


@dataclass(frozen=True)
class _Measuring(BlockMethod[_Both]):
    """Compresses each layer at every value and restores it."""

    method: Method
    at: Mapping[str, Method]
    add: Callable[[str, dict[str, float]], None]
    seen: set[str] = field(default_factory=set)

    def observe(self, in_features: int, device: torch.device) -> _Both:
        moments = Hessian(in_features, device)
        own = self.method.observe(in_features, device) if isinstance(self.method, Calibrated) else _Nothing()
        return _Both(moments, own)

    def shrink(self, layers: Sequence[TargetLayer], statistics: _Both) -> list[LayerReport]:
        old = [layer.weight.clone() for layer in layers]
        before = [dict(layer.notes) for layer in layers]
        errors: dict[str, dict[str, float]] = {layer.path: {} for layer in layers}
        for value, method in self.at.items():
            at_value(method, layers, statistics.own)
            for layer, weight, notes in zip(layers, old, before, strict=True):
                now = [layer.weight.float()]
                errors[layer.path][value] = relative_errors(weight.float(), now, statistics.moments.matrix)[0]
                layer.weight.copy_(weight)
                for name in layer.notes.keys() - notes.keys():
                    del layer.notes[name]
                layer.notes.update(notes)
        for path, found in errors.items():
            self.add(path, found)
        return [LayerReport.of(layer) for layer in layers]


class _Nothing(Statistics):
    """Empty statistics, for a method that uses only the layer itself."""

    def update(self, inputs: LayerInputs) -> None:
        return


def at_value(method: Method, layers: Sequence[TargetLayer], statistics: Any) -> list[LayerReport]:
    """Compress layers that read the same inputs by a method with their setting."""
    if isinstance(method, Calibrated):
        return method.shrink(layers, statistics)
    assert isinstance(method, LayerByLayer)
    return [alone(method, layer) for layer in layers]


def alone(method: LayerByLayer, layer: TargetLayer) -> LayerReport:
    """Compress a layer as if it were the only one."""
    one: Any = [layer]
    return method.shrinker(one, lambda: [layer])(layer) if not hasattr(method, "scope") else _by_itself(method, layer)


def _by_itself(method: Any, layer: TargetLayer) -> LayerReport:
    """A ranking over this layer's own weights."""
    return replace(method, scope="layer").shrinker([layer], lambda: [layer])(layer)
