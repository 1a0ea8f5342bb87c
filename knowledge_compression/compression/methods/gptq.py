"""GPTQ: weights rounded column by column, later ones making up for the error of earlier (Frantar et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.building import Positive
from knowledge_compression.compression.calibrated import SecondOrder, Solved
from knowledge_compression.compression.solve.compensation import compensate
from knowledge_compression.compression.solve.grid import (
    SCALE_BITS,
    Grid,
    GroupedColumns,
    QuantizedWeight,
    plainly_rounded,
)
from knowledge_compression.compression.solve.hessian import Hessian, inverse_factor
from knowledge_compression.identity import SPEED
from knowledge_compression.models import Targets


@dataclass(frozen=True)
class Gptq(SecondOrder):
    """Quantize with the curvature of each layer's output error on calibration text.

    ``docs/calibrated-compression.md`` gives the reason for each default with its figures; the published script's are
    ``clip=minmax desc_act=false``.

    Attributes:
        bits, group_size, symmetric, clip, scale_bits: the grid
            (:class:`~knowledge_compression.compression.solve.grid.Grid`).
        desc_act: round the columns in the order of falling second moment, not as they stand.
        static_groups: choose every group's grid beforehand, from the columns as they stand, so that a group is a run of
            neighbours whatever the order; else a group is a run of the order, its grid chosen when its turn comes.
        block_size: columns whose errors are gathered before they move on; changes the speed only.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    clip: str = "mse"
    scale_bits: int = SCALE_BITS
    desc_act: bool = True
    static_groups: bool = True
    block_size: Positive = field(default=128, metadata=SPEED)
    name = "gptq"

    @property
    def grid(self) -> Grid:
        """The grid that was asked for."""
        return Grid(self.bits, self.group_size, self.symmetric, self.clip, self.scale_bits)

    def check(self, targets: Targets) -> None:
        """Refuse groups wider than a layer, too."""
        super().check(targets)
        self.grid.check(targets, whole=False)

    def solve(self, weight: Tensor, statistics: Hessian, heights: Sequence[int]) -> Solved:
        """Quantize the weight, with the curvature that the inputs give."""
        quantized, damping, fallbacks = self.quantize(weight, statistics.matrix)
        plain = plainly_rounded(weight, replace(self.grid, clip="minmax")).dequantize().to(weight)
        return Solved(quantized=quantized, plain=plain, damping=damping, fallbacks=fallbacks)

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
