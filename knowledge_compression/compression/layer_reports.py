"""What a compression did, layer by layer, and what that adds up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from knowledge_compression.models.targets import TargetLayer


@dataclass
class LayerReport:
    """What happened to one layer.

    Attributes:
        path, role: which layer.
        parameters: number of weights in it.
        removed: weights that the method set to zero (counted from its masks; a quantized zero is not a pruned one).
        bits: bits of one kept weight, e.g. 32.0, 16.0, 8.0, 3.0.
        overhead_bits: bits for scales, zero points and the like over the whole layer.
        error_before, error_after: mean squared error of the layer's output on the calibration text, by plain rounding
            or masking and by the method itself, relative to the output's mean square; None where nothing was measured.
        damping: relative damping of the Hessian that made it positive definite, if one was used.
        fallbacks: names of fall-backs taken, e.g. ``dead_input``, ``damping_raised``; empty when all went as planned.
        seconds: time spent on the layer's algorithm.
        removable: whether weights of it were asked to be removed, so that it counts for the sparsity; false where a
            quantization behind a pruning takes in a layer that the pruning left out.
        tokens: of an expert in a calibrated method, how many tokens of the calibration text the router sent to it.
    """

    path: str
    role: str
    parameters: int
    removed: int = 0
    bits: float = 32.0
    overhead_bits: int = 0
    error_before: float | None = None
    error_after: float | None = None
    damping: float | None = None
    fallbacks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    removable: bool = True
    tokens: int | None = None

    @classmethod
    def of(cls, layer: TargetLayer, **what: Any) -> LayerReport:
        """Of a layer; its weights are told as they are stored, unless ``what`` says otherwise."""
        as_stored = {"bits": 8.0 * layer.weight.element_size()}
        return cls(layer.path, layer.role, layer.parameters, **(as_stored | what))

    @property
    def sparsity(self) -> float:
        """Share of the layer's weights that was removed."""
        return self.removed / self.parameters

    @property
    def stored_bits(self) -> int:
        """Bits to store the layer: kept weights with a bitmask saying which, or all of them, whichever is smaller."""
        whole = self.parameters * self.bits
        sparse = (self.parameters - self.removed) * self.bits + self.parameters if self.removed else whole
        return round(min(whole, sparse)) + self.overhead_bits


@dataclass
class CompressionReport:
    """What a compression touched and reached.

    Attributes:
        method: name of the method, e.g. ``magnitude``.
        layers: one entry for each layer touched, in forward order.
        model_parameters: distinct parameters of the whole model before compression.
        model_bytes_before, model_bytes_after: bytes of all parameters and buffers in memory.
        seconds: wall time of the whole compression.
        peak_memory: bytes above the loaded model at the worst moment, None where it was not measured.
        calibration: digest of the token ids that it was calibrated with, None where it needs none.
        forward_dtype: type in which the forward passes on calibration text multiplied, None where there were none.
    """

    method: str
    layers: list[LayerReport] = field(default_factory=list)
    model_parameters: int = 0
    model_bytes_before: int = 0
    model_bytes_after: int = 0
    seconds: float = 0.0
    peak_memory: int | None = None
    calibration: str | None = None
    forward_dtype: str | None = None

    @property
    def parameters_touched(self) -> int:
        """Weights in the touched layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def removed(self) -> int:
        """Weights set to zero."""
        return sum(layer.removed for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share that was removed of the weights in the layers that a removal was asked of."""
        asked = sum(layer.parameters for layer in self.layers if layer.removable)
        return self.removed / asked if asked else 0.0

    @property
    def model_sparsity(self) -> float:
        """Share of all the model's parameters that was removed."""
        return self.removed / self.model_parameters if self.model_parameters else 0.0

    @property
    def bits(self) -> float:
        """Mean bits of a kept weight in the touched layers, without scales."""
        kept = sum(layer.parameters - layer.removed for layer in self.layers)
        return sum((layer.parameters - layer.removed) * layer.bits for layer in self.layers) / kept if kept else 0.0

    @property
    def stored_bytes(self) -> int:
        """Bytes of a file that stores the touched layers at their bits and sparsity and the rest as it was."""
        untouched = self.model_parameters - self.parameters_touched
        dense_bytes = self.model_bytes_before / self.model_parameters if self.model_parameters else 0.0
        return round(max(untouched, 0) * dense_bytes + sum(layer.stored_bits for layer in self.layers) / 8)

    @property
    def fallbacks(self) -> dict[str, int]:
        """How often each fall-back was taken."""
        return dict(Counter(name for layer in self.layers for name in layer.fallbacks))

    def summary(self) -> dict[str, Any]:
        """The figures that a table of runs shows, JSON-ready."""
        return {
            "method": self.method,
            "layers_touched": len(self.layers),
            "parameters_touched": self.parameters_touched,
            "model_parameters": self.model_parameters,
            "sparsity": self.sparsity,
            "model_sparsity": self.model_sparsity,
            "bits": self.bits,
            "memory_bytes_before": self.model_bytes_before,
            "memory_bytes": self.model_bytes_after,
            "stored_bytes": self.stored_bytes,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "fallbacks": self.fallbacks,
        }

    def to_json(self) -> dict[str, Any]:
        """The summary and every layer, JSON-ready."""
        told = {"calibration": self.calibration, "forward_dtype": self.forward_dtype}
        calibration = {name: value for name, value in told.items() if value is not None}
        return self.summary() | {"layers": [asdict(layer) for layer in self.layers]} | calibration

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CompressionReport:
        """The report that :meth:`to_json` was made of."""
        return cls(
            method=content["method"],
            layers=[LayerReport(**layer) for layer in content["layers"]],
            model_parameters=content["model_parameters"],
            model_bytes_before=content["memory_bytes_before"],
            model_bytes_after=content["memory_bytes"],
            seconds=content["seconds"],
            peak_memory=content["peak_memory"],
            calibration=content.get("calibration"),
            forward_dtype=content.get("forward_dtype"),
        )


def followed_by(first: CompressionReport, second: CompressionReport) -> CompressionReport:
    """The report of two compressions done one after the other on the same model, e.g. prune, then quantize."""
    before = {layer.path: layer for layer in first.layers}
    merged: list[LayerReport] = []
    for layer in second.layers:
        earlier = before.pop(layer.path, None)
        if earlier is not None:
            layer.removed = max(layer.removed, earlier.removed)
            layer.bits = min(layer.bits, earlier.bits)
            layer.fallbacks = [*earlier.fallbacks, *layer.fallbacks]
            layer.seconds += earlier.seconds
            layer.removable = earlier.removable or layer.removable
        else:
            layer.removable = False  # the first one was not asked to touch it: published int8 takes in the final layer
        merged.append(layer)
    peaks: Sequence[int] = [r.peak_memory for r in (first, second) if r.peak_memory is not None]
    return CompressionReport(
        method=f"{first.method}+{second.method}",
        layers=[*before.values(), *merged],
        model_parameters=first.model_parameters,
        model_bytes_before=first.model_bytes_before,
        model_bytes_after=second.model_bytes_after,
        seconds=first.seconds + second.seconds,
        peak_memory=max(peaks, default=None),
        forward_dtype=first.forward_dtype or second.forward_dtype,
    )
