"""What a compression did to each layer, and the totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.base import StoredAs
from knowledge_compression.models.targets import TargetLayer


@dataclass
class LayerReport:
    """The report on one layer.

    Attributes:
        path, role: the layer's module path and its role, e.g. ``ff``.
        parameters: number of weights in it.
        removed: number of weights that the method pruned (counted from its masks; a weight rounded to zero is not
            pruned).
        bits: bits of one kept weight, e.g. 32.0, 16.0, 8.0, 3.0.
        overhead_bits: bits for scales and zero points of the whole layer.
        error_before, error_after: mean squared error of the layer's output on the calibration text relative to the
            output's mean square, for plain rounding or masking and for the method itself; None if not measured.
        damping: relative damping of the Hessian that made it positive definite, if one was used.
        fallbacks: names of fallbacks taken, e.g. ``dead_input``, ``damping_raised``; empty if none was needed.
        seconds: time spent on the layer's algorithm.
        removable: whether the layer was to be pruned and so counts towards the sparsity; false if a quantization after
            a pruning includes a layer that the pruning left out.
        factors_in: names of the parameters that were divided by factors of the layer's inputs: of a norm, or of the
            linear layer before.
        tokens: for an expert and a calibrated method, the number of calibration tokens that the router sent to it; 0
            for another layer that the calibration text never reached.
        cut: how many of the removed weights no longer exist, because the matrix became smaller or its block was
            dropped; the others are zeros.
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
    factors_in: list[str] = field(default_factory=list)
    cut: int = 0

    @classmethod
    def of(cls, layer: TargetLayer, **what: Any) -> LayerReport:
        """The report on a layer; bits are those of the stored weights unless given in ``what``."""
        as_stored = {"bits": 8.0 * layer.weight.element_size()}
        return cls(layer.path, layer.role, layer.parameters, **(as_stored | what))

    @property
    def sparsity(self) -> float:
        """Share of the layer's weights that was removed."""
        return self.removed / self.parameters

    @property
    def stored_bits(self) -> int:
        """Bits to store what is left: kept weights with a bitmask of their positions, or all weights, if smaller."""
        there = self.parameters - self.cut
        whole = there * self.bits
        sparse = (self.parameters - self.removed) * self.bits + there if self.removed > self.cut else whole
        return round(min(whole, sparse)) + self.overhead_bits


@dataclass(frozen=True)
class SmallerReport:
    """What is left of a network whose architecture a compression made smaller.

    Attributes:
        parameters: distinct parameters of the whole model now.
        settings: the configuration's values that changed, each before and now.
        dropped: former paths of the dropped blocks.
        moved: the new path of each renumbered block, by its former path.
        measured: the measurements by which the method chose, e.g. each block's influence; JSON-ready.
    """

    parameters: int
    settings: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    dropped: Sequence[str] = ()
    moved: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def path_now(self, path: str) -> str | None:
        """The path of a layer now, given its former path; None if it was dropped."""
        if any(path.startswith(f"{block}.") for block in self.dropped):
            return None
        return _with_block(path, self.moved)

    def path_before(self, path: str) -> str:
        """The former path of a layer, given its path now."""
        return _with_block(path, {now: before for before, now in self.moved.items()})


def _with_block(path: str, blocks: Mapping[str, str]) -> str:
    return next((other + path[len(block) :] for block, other in blocks.items() if path.startswith(f"{block}.")), path)


@dataclass
class CompressionReport:
    """The report on a whole compression.

    Attributes:
        method: name of the method, e.g. ``magnitude``.
        layers: one entry per compressed layer, in forward order.
        model_parameters: distinct parameters of the whole model before compression.
        model_bytes_before, model_bytes_after: bytes of all parameters and buffers in memory.
        seconds: wall time of the whole compression.
        peak_memory: peak bytes above the loaded model; None if not measured.
        calibration: digest of the calibration token ids; None if the method needs none.
        forward_dtype: dtype of the matrix products in the forward passes on calibration text; None if there were none.
        stored: how the model was stored before, if in a compressed format.
        smaller: the changed architecture, if the method changed it. Layers are reported by their former paths.
        allocation: how a budget was spread: the budget, what was reached and the gap between them; each layer's value;
            and the measurements behind it, with the seconds and tokens that they took.
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
    stored: StoredAs | None = None
    smaller: SmallerReport | None = None
    allocation: Mapping[str, Any] | None = None

    @property
    def parameters_touched(self) -> int:
        """Number of weights in the compressed layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def removed(self) -> int:
        """Number of weights pruned."""
        return sum(layer.removed for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of the weights removed, in the layers that were to be pruned."""
        asked = sum(layer.parameters for layer in self.layers if layer.removable)
        return self.removed / asked if asked else 0.0

    @property
    def model_sparsity(self) -> float:
        """Share of all the model's parameters that was removed."""
        return self.removed / self.model_parameters if self.model_parameters else 0.0

    @property
    def bits(self) -> float:
        """Mean bits of a kept weight in the compressed layers, without scales; without layers, of the stored model."""
        if not self.layers and self.stored is not None:
            return self.stored.bits
        kept = sum(layer.parameters - layer.removed for layer in self.layers)
        return sum((layer.parameters - layer.removed) * layer.bits for layer in self.layers) / kept if kept else 0.0

    @property
    def stored_bytes(self) -> int:
        """Bytes of a file that stores the compressed layers at their bits and sparsity, and the rest unchanged."""
        if not self.layers and self.stored is not None:
            return self.stored.bytes
        untouched = self.model_parameters - self.parameters_touched
        if self.smaller is not None:  # norms and biases are dropped with their block or channel
            untouched = self.smaller.parameters - sum(layer.parameters - layer.cut for layer in self.layers)
        before = self.stored.bytes if self.stored is not None else self.model_bytes_before
        dense_bytes = before / self.model_parameters if self.model_parameters else 0.0
        return round(max(untouched, 0) * dense_bytes + sum(layer.stored_bits for layer in self.layers) / 8)

    @property
    def fallbacks(self) -> dict[str, int]:
        """How often each fallback was taken."""
        return dict(Counter(name for layer in self.layers for name in layer.fallbacks))

    def summary(self) -> dict[str, Any]:
        """The figures shown in a table of runs, JSON-ready."""
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
        told: dict[str, Any] = {"calibration": self.calibration, "forward_dtype": self.forward_dtype}
        told["stored"] = None if self.stored is None else asdict(self.stored)
        told["allocation"] = self.allocation
        told["smaller"] = None if self.smaller is None else asdict(self.smaller)
        calibration = {name: value for name, value in told.items() if value is not None}
        return self.summary() | {"layers": [asdict(layer) for layer in self.layers]} | calibration

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CompressionReport:
        """The report that :meth:`to_json` describes."""
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
            stored=StoredAs(**content["stored"]) if content.get("stored") else None,
            allocation=content.get("allocation"),
            smaller=SmallerReport(**content["smaller"]) if content.get("smaller") else None,
        )


def followed_by(first: CompressionReport, second: CompressionReport) -> CompressionReport:
    """The combined report of two successive compressions of one model, e.g. prune, then quantize."""
    before = {layer.path: layer for layer in first.layers}
    merged: list[LayerReport] = []
    if first.smaller is not None and second.smaller is not None:
        raise BadInput("a run can make the architecture smaller only once; keep one of depth and width")
    for layer in second.layers:
        if first.smaller is not None:
            layer.path = first.smaller.path_before(layer.path)
        earlier = before.pop(layer.path, None)
        if earlier is not None:
            if earlier.cut:
                layer.cut, layer.removed = earlier.cut, layer.removed + earlier.cut
                layer.parameters = earlier.parameters
            layer.removed = max(layer.removed, earlier.removed)
            layer.bits = min(layer.bits, earlier.bits)
            layer.fallbacks = [*earlier.fallbacks, *layer.fallbacks]
            layer.factors_in = [*earlier.factors_in, *layer.factors_in]
            layer.seconds += earlier.seconds
            layer.removable = earlier.removable or layer.removable
        else:
            layer.removable = False  # the pruning left it out: published int8 includes the final layer
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
        stored=first.stored,
        smaller=first.smaller or second.smaller,
    )
