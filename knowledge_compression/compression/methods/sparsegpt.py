"""SparseGPT: weights removed column by column, the later ones compensating (Frantar and Alistarh 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.building import Positive
from knowledge_compression.compression.base import Patterned, check_sparsity
from knowledge_compression.compression.calibrated import SecondOrder, Solved
from knowledge_compression.compression.solve.coding import Coding
from knowledge_compression.compression.solve.compensation import compensate
from knowledge_compression.compression.solve.grid import SCALE_BITS, Grid, GroupedColumns
from knowledge_compression.compression.solve.hessian import Hessian, inverse_factor
from knowledge_compression.compression.solve.refit import refit
from knowledge_compression.compression.solve.threshold import smallest
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import Targets

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SparseGpt(Patterned, SecondOrder):
    """Prune using the curvature of each layer's output error on calibration text; can quantize in the same sweep.

    ``docs/calibrated-compression.md`` gives the reason for each default, with measurements; the published script's
    settings are ``refit=0 true_sequential=false``.

    Attributes:
        sparsity: share of each layer's weights to remove, in [0, 1).
        pattern: ``n:m``, e.g. ``2:4``: keep n of every m neighbouring inputs; the sparsity is then that of the pattern.
        bits: width of the codes to which the kept weights are rounded; None does not quantize.
        group_size, symmetric, clip, scale_bits: the grid, if ``bits`` is given.
        block_size: number of columns among which the weights to remove are chosen jointly (without a pattern).
        refit: conjugate-gradient steps that refit the kept weights jointly once the mask is fixed; 0 keeps the values
            of the sweep. With ``bits`` there is no refit, as it would move the weights off the grid.
    """

    sparsity: float
    pattern: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = False
    clip: str = "mse"
    scale_bits: int = SCALE_BITS
    block_size: Positive = 128
    refit: int = 3
    name = "sparsegpt"

    def __post_init__(self) -> None:
        """Refuse invalid settings before anything is loaded."""
        super().__post_init__()
        check_sparsity(self.sparsity)
        if self.refit < 0:
            raise BadInput(f"compression.refit={self.refit} is not a number of steps; choose 3, or 0 for none")
        _ = self.shape, self._grid(4 if self.bits is None else self.bits)

    @property
    def grid(self) -> Grid | None:
        """The grid of these settings, if they quantize."""
        return None if self.bits is None else self._grid(self.bits)

    def _grid(self, bits: int) -> Grid:
        return Grid(bits, self.group_size, self.symmetric, self.clip, self.scale_bits)

    @property
    def coding(self) -> Coding | None:
        """Integers on the grid; None without one."""
        return self.grid.coding() if self.grid else None

    def check(self, targets: Targets) -> None:
        """Refuse a pattern or grid that does not fit."""
        super().check(targets)
        if self.grid:
            self.grid.check(targets, whole=False)

    def solve(self, weight: Tensor, statistics: Hessian, heights: Sequence[int]) -> Solved:
        """Prune the stacked weight, each layer in it to exactly the given sparsity."""
        return self.prune(weight, statistics.matrix, heights)

    def prune(self, weight: Tensor, hessian: Tensor, heights: Sequence[int] | None = None) -> Solved:
        """The algorithm itself, on tensors alone.

        Args:
            weight: float32 ``[out_features, in_features]``.
            hessian: mean second moments of the inputs, ``[in_features, in_features]``.
            heights: number of rows of each layer stacked in ``weight``; each is pruned to the sparsity separately.

        Returns:
            The new weight; if no damping made the Hessian positive definite, it is pruned by Wanda's score instead
            (fallback ``not_positive_definite``).
        """
        rows = list(heights or [len(weight)])
        columns = torch.arange(len(hessian), device=hessian.device)
        factor = inverse_factor(hessian, self.damping)
        upper = factor.upper if factor else torch.eye(len(hessian)).to(hessian)
        pivots = factor.pivots if factor else hessian.diagonal().clamp(min=1e-12).reciprocal()
        worth = pivots.rsqrt()[:, None]  # Optimal Brain Surgeon: w² / [H⁻¹]ᵢᵢ over the remaining columns
        turned = weight.T.clone(memory_format=torch.contiguous_format)
        mask = torch.zeros_like(turned, dtype=torch.bool)
        removed = [0] * len(rows)

        def choose(start: int, end: int) -> None:
            scores = (turned[start:end] * worth[start:end]).split(rows, dim=1)
            for j, (part, goes) in enumerate(zip(scores, mask[start:end].split(rows, dim=1), strict=True)):
                if self.shape:
                    goes.copy_(self.shape.removes(part.T).T)
                else:  # counted from the first column, so that rounding errors do not accumulate
                    count = round(self.sparsity * rows[j] * end) - removed[j]
                    goes.copy_(_smallest(part, count))
                    removed[j] += count

        groups = None
        if self.grid:
            width = self.grid.width(len(hessian))
            groups = GroupedColumns(self.grid, len(weight), columns // width)
            for group, start in enumerate(range(0, len(hessian), width)):
                part = slice(start, start + width)
                groups.fit(group, turned[part], hessian.diagonal()[part])

        def project(i: int, column: Tensor) -> Tensor:
            kept = column.masked_fill(mask[i], 0)
            return groups.round(i, kept) if groups else kept

        unit = self.shape.of if self.shape else self.block_size
        compensate(turned, upper, project, prepare=choose, unit=unit, block_size=self.block_size)
        damping, fallbacks = (factor.damping, factor.fallbacks) if factor else (None, ["not_positive_definite"])
        del factor, upper  # each is as large as the Hessian
        if damping is not None and not groups:
            refit(turned, weight.T, ~mask, hessian, damping=damping, steps=self.refit)
        quantized = groups.quantized(turned, columns) if groups else None
        return Solved(weight=turned.T, quantized=quantized, removed=mask.T, damping=damping, fallbacks=fallbacks)


def _smallest(scores: Tensor, count: int) -> Tensor:
    return smallest(lambda: [scores], count).removes(scores)
