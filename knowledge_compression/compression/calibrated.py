"""Methods that use a layer's inputs: the walk, the bookkeeping and the measurements that all of them share.

A method implements :meth:`Calibrated.observe` (which statistics of a layer's inputs to keep) and
:meth:`Calibrated.solve` (how a weight is compressed, given the statistics). Both compute in float32, whatever the dtype
of the forward passes.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from knowledge_compression.compression.base import Method
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.grid import QuantizedWeight
from knowledge_compression.compression.solve.hessian import Hessian, relative_errors
from knowledge_compression.compression.walk.statistics import Observed, Statistics, WalkSettings
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.identity import SPEED
from knowledge_compression.models import Model, TargetLayer, Targets

if TYPE_CHECKING:
    from torch import LongTensor, Tensor

    from knowledge_compression.compression.walk.blocks import Hold
    from knowledge_compression.compression.walk.tuning import CompressedBlock
    from knowledge_compression.models.replaced import ReplacedLinear

S = TypeVar("S", bound=Statistics)


@dataclass(frozen=True)
class Solved:
    """The result for one weight ``[out_features, in_features]``; a method sets one of ``weight``, ``quantized`` and
    ``module``.

    Attributes:
        weight: the new values, float32; None keeps the old values except for those removed.
        quantized: the integer codes of the new values.
        module: builds the module that replaces a layer.
        removed: which weights are set to zero, bool, of the weight's shape.
        plain: the result of plain rounding, float32, with which the method's error is compared; if weights are removed,
            the old weight with those set to zero.
        bits: bits of one stored weight, if they differ from the original.
        overhead_bits: bits for scales and zero points, per output row and for the whole layer.
        damping: relative damping of the Hessian, if one was factored.
        fallbacks: names of the fallbacks taken, e.g. ``dead_input``.
        factors_in: names of the parameters that were scaled by factors of the inputs.
    """

    weight: Tensor | None = None
    quantized: QuantizedWeight | None = None
    module: Callable[[TargetLayer], ReplacedLinear] | None = None
    removed: Tensor | None = None
    plain: Tensor | None = None
    bits: float | None = None
    overhead_bits: tuple[int, int] = (0, 0)
    damping: float | None = None
    fallbacks: Sequence[str] = ()
    factors_in: Sequence[str] = ()

    def rows(self, start: int, end: int) -> Solved:
        """The part that belongs to one layer, if the weights of several were stacked."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:end]

        quantized = self.quantized and self.quantized.rows(start, end)
        return replace(
            self, weight=part(self.weight), removed=part(self.removed), plain=part(self.plain), quantized=quantized
        )


@dataclass(frozen=True, kw_only=True)
class Calibrated(Method, Generic[S]):
    """A method that compresses each layer using its inputs on the calibration text.

    Attributes:
        forward_dtype: dtype of the matrix products in the forward passes of a float32 network: ``auto`` (see
            ``models.device``), ``bfloat16`` or ``float32``; everything else is computed in float32.
        device: where blocks are computed, one at a time, e.g. ``cuda:0``; None computes them where they are stored.
    """

    forward_dtype: str = "auto"
    device: str | None = field(default=None, metadata=SPEED)
    calibrated: ClassVar[bool] = True

    # Whether it computes and factors the second moments of the inputs, which is then most of its work.
    second_order: ClassVar[bool] = False

    @property
    def walk(self) -> WalkSettings:
        """How the walk goes through the blocks."""
        return WalkSettings(forward_dtype=self.forward_dtype, device=self.device)

    @property
    def streams(self) -> bool:
        """Also false if the text goes through the uncompressed blocks too, because a stream reads each block once."""
        return super().streams and not self.walk.beside

    def passes(self, windows: int, length: int) -> float:
        """Those of the walk."""
        return self.walk.passes(windows * length)

    @abstractmethod
    def observe(self, in_features: int, device: torch.device) -> S:
        """Empty statistics for inputs of this width; all linears that read the same tensor share one."""

    def prepare(self, block: Observed[S]) -> None:
        """Change a block before its layers are compressed; most methods do not."""

    def solve(self, weight: Tensor, statistics: S, heights: Sequence[int]) -> Solved:
        """Compress the stacked weights of linears that read the same inputs; a method whose results depend on which
        layers they are implements :meth:`shrink` instead.

        Args:
            weight: float32 ``[sum of heights, in_features]`` on the compute device; must not be modified.
            statistics: the statistics of the inputs.
            heights: number of rows of each linear, for methods that treat each separately.
        """
        raise NotImplementedError(f"{self.name} does not implement solve()")

    def tune(self, block: CompressedBlock) -> None:
        """Improve a block whose layers have been solved for, in place; for methods whose :attr:`walk` asks for it."""
        raise NotImplementedError(f"{self.name} asks for tuned blocks and does not implement tune()")

    def multiplies_in(self, model: Model) -> str:
        """The user's choice, as far as the device and the network's dtype allow."""
        return str(self.walk.multiplied_in(model) or model.dtype).removeprefix("torch.")

    def apply(
        self, model: Model, targets: Targets, calibration: LongTensor | None, hold: Hold | None = None
    ) -> list[LayerReport]:
        """Walk through the network and compress its layers; for ``hold`` see :func:`compress_blocks`."""
        from knowledge_compression.compression.walk.blocks import compress_blocks

        return compress_blocks(model, targets, calibration, self, self.walk, hold=hold)

    def shrink(self, layers: Sequence[TargetLayer], statistics: S) -> list[LayerReport]:
        """Solve for linears that read the same inputs, install the results and measure the errors."""
        start = time.perf_counter()
        weights = [layer.weight for layer in layers]
        stacked = (weights[0] if len(weights) == 1 else torch.cat(weights)).float()
        heights = [len(weight) for weight in weights]
        solved = self.solve(stacked, statistics, heights)
        reports, row = [], 0
        for layer, height in zip(layers, heights, strict=True):
            part = solved.rows(row, row + height)
            reports.append(_put(part, layer, stacked[row : row + height], statistics.second_moments))
            row += height
        for report in reports:
            report.seconds = (time.perf_counter() - start) / len(reports)
        return reports


@dataclass(frozen=True, kw_only=True)
class SecondOrder(Calibrated[Hessian]):
    """A method that compensates for its errors using the curvature (Hessian) of each layer's squared output error.

    Attributes:
        damping: constant added to the Hessian's diagonal, relative to the diagonal's mean.
        true_sequential, by_influence: see :class:`~knowledge_compression.compression.walk.blocks.WalkSettings`; at most
            one of them can be true.
    """

    damping: float = 0.01
    true_sequential: bool = True
    by_influence: bool = False
    second_order: ClassVar[bool] = True

    @property
    def walk(self) -> WalkSettings:
        """The user's settings."""
        return WalkSettings(self.true_sequential, self.by_influence, self.device, self.forward_dtype)

    def __post_init__(self) -> None:
        """Refuse a damping that is not positive."""
        if self.damping <= 0:
            raise BadInput(f"compression.damping={self.damping} must be above 0, e.g. 0.01")

    def observe(self, in_features: int, device: torch.device) -> Hessian:
        """The Hessian that all linears with one input share."""
        return Hessian(in_features, device)


def _put(solved: Solved, layer: TargetLayer, old: Tensor, hessian: Tensor | None) -> LayerReport:
    """Install a layer's result; errors are measured first, because ``old`` may be the layer's own weight."""
    if solved.module is not None:
        module = solved.module(layer)
        report = LayerReport.of(layer, bits=module.bits, overhead_bits=module.overhead_bits)
        layer.replace(module)
    else:
        report = solved.quantized.report(layer) if solved.quantized else LayerReport.of(layer)
        if solved.bits is not None:
            a_row, a_layer = solved.overhead_bits
            report.bits, report.overhead_bits = solved.bits, len(old) * a_row + a_layer
        plain = solved.plain
        if solved.removed is not None:
            report.removed = int(solved.removed.sum())
            plain = old.masked_fill(solved.removed, 0)
        new = solved.quantized.dequantize() if solved.quantized else solved.weight
        stored = (plain if new is None else new).to(layer.weight)  # type: ignore[union-attr]  # one of them is set
        if hessian is not None and plain is not None:
            report.error_before, report.error_after = relative_errors(old, [plain, stored], hessian)
        if solved.quantized:
            solved.quantized.put_into(layer)
        else:
            layer.weight.copy_(stored)
    report.damping = solved.damping
    report.fallbacks += solved.fallbacks
    report.factors_in += solved.factors_in
    return report
