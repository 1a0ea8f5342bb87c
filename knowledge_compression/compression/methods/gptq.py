"""GPTQ: weights rounded column by column, later ones making up for the error of earlier (Frantar et al. 2023)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import LongTensor, Tensor

from knowledge_compression.compression.base import stacked
from knowledge_compression.compression.layer_reports import CompressionReport, LayerReport
from knowledge_compression.compression.solve.compensation import compensate
from knowledge_compression.compression.solve.grid import (
    SCALE_BITS,
    Grid,
    GroupedColumns,
    QuantizedWeight,
    plainly_rounded,
    quantized_report,
)
from knowledge_compression.compression.solve.hessian import Hessian, check_damping, inverse_factor, relative_errors
from knowledge_compression.compression.walk.blocks import compress_calibrated
from knowledge_compression.models import Model, TargetLayer, Targets


@dataclass(frozen=True)
class Gptq:
    """Quantize with the curvature of each layer's output error on calibration text.

    ``docs/calibrated-compression.md`` gives the reason for each default with its figures; the published script's are
    ``clip=minmax desc_act=false``.

    Attributes:
        bits, group_size, symmetric, clip, scale_bits: the grid
            (:class:`~knowledge_compression.compression.solve.grid.Grid`).
        desc_act: round the columns in the order of falling second moment, not as they stand.
        static_groups: choose every group's grid beforehand, from the columns as they stand, so that a group is a run of
            neighbours whatever the order; else a group is a run of the order, its grid chosen when its turn comes.
        damping: what is added to the Hessian's diagonal, relative to its mean.
        block_size: columns whose errors are gathered before they move on; changes the speed only.
        by_influence: weigh each token by how far an error there moves the block's output; looks at whole blocks, so
            ``true_sequential`` must be false then.
        true_sequential, forward_dtype, device: see ``walk.blocks.compress_blocks``.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    clip: str = "mse"
    scale_bits: int = SCALE_BITS
    desc_act: bool = True
    static_groups: bool = True
    damping: float = 0.01
    block_size: int = 128
    true_sequential: bool = True
    by_influence: bool = False
    forward_dtype: str = "auto"
    device: str | None = None
    calibrated: ClassVar[bool] = True

    @property
    def grid(self) -> Grid:
        """The grid that was asked for."""
        return Grid(self.bits, self.group_size, self.symmetric, self.clip, self.scale_bits)

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None) -> CompressionReport:
        """Quantize the targets in place."""
        self.grid.check(targets, whole=False)
        check_damping(self.damping)
        walk = {"true_sequential": self.true_sequential, "by_influence": self.by_influence}
        return compress_calibrated("gptq", self, model, targets, calibration, **walk)

    def observe(self, in_features: int, device: torch.device) -> Hessian:
        """The Hessian that all linears with one input share."""
        return Hessian(in_features, device)

    def shrink(self, layers: Sequence[TargetLayer], statistics: Hessian) -> list[LayerReport]:
        """Quantize linears that read the same inputs as one tall weight."""
        start = time.perf_counter()
        hessian = statistics.matrix
        weight = stacked(layers).to(hessian)
        quantized, damping, fallbacks = self.quantize(weight, hessian)
        plain = plainly_rounded(weight, replace(self.grid, clip="minmax")).dequantize().to(weight)
        seconds = (time.perf_counter() - start) / len(layers)
        reports, row = [], 0
        heights = [len(layer.weight) for layer in layers]
        for layer, old, rounded in zip(layers, weight.split(heights), plain.split(heights), strict=True):
            part = quantized.rows(row, row := row + len(old))
            report = quantized_report(layer, part, seconds)
            new = part.dequantize().to(layer.weight)
            report.error_before, report.error_after = relative_errors(old, [rounded, new], hessian)
            part.put_into(layer)  # only now, as the old weight may be the layer's own
            report.damping = damping
            report.fallbacks += fallbacks
            reports.append(report)
        return reports

    def quantize(self, weight: Tensor, hessian: Tensor) -> tuple[QuantizedWeight, float | None, list[str]]:
        """The algorithm itself, which knows nothing of models.

        Args:
            weight: float32 ``[out_features, in_features]``.
            hessian: mean second moments of the inputs, ``[in_features, in_features]``.

        Returns:
            The quantized weight, the relative damping used (None where plain rounding had to do), and the names of the
            fall-backs taken: ``dead_input``, ``damping_raised``, ``not_positive_definite``.
        """
        importance = hessian.diagonal()
        columns = torch.arange(len(hessian), device=hessian.device)
        order = torch.argsort(importance, descending=True, stable=True) if self.desc_act else columns
        factor = inverse_factor(hessian, self.damping, order)
        if factor is None:
            return plainly_rounded(weight, self.grid), None, ["not_positive_definite"]

        width = self.grid.width(len(hessian))
        beforehand = self.static_groups or self.group_size is None
        groups = GroupedColumns(self.grid, len(weight), (order if beforehand else columns) // width)
        if beforehand:
            for group, start in enumerate(range(0, len(hessian), width)):
                groups.fit(group, weight[:, start : start + width].T, importance[start : start + width])
        turned = weight.T[order].contiguous()

        def fit(start: int, end: int) -> None:
            groups.fit(start // width, turned[start:end], importance[order[start:end]])

        in_turn: dict[str, Any] = {} if beforehand else {"prepare": fit, "unit": width}
        compensate(turned, factor.upper, groups.round, block_size=self.block_size, **in_turn)
        damping, fallbacks = factor.damping, factor.fallbacks
        del factor  # which is as large as the Hessian
        return groups.quantized(turned, order), damping, fallbacks
