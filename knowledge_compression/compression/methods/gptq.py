"""GPTQ: weights rounded column by column, the later ones compensating for earlier errors (Frantar et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from knowledge_compression.building import Positive
from knowledge_compression.compression.calibrated import SecondOrder, Solved
from knowledge_compression.compression.solve.coding import Coding
from knowledge_compression.compression.solve.compensation import compensate, pull
from knowledge_compression.compression.solve.descent import descended
from knowledge_compression.compression.solve.grid import (
    SCALE_BITS,
    Grid,
    GroupedColumns,
    QuantizedWeight,
    plainly_rounded,
)
from knowledge_compression.compression.solve.hessian import Hessian, inverse_factor
from knowledge_compression.heavy import torch
from knowledge_compression.identity import SPEED
from knowledge_compression.models import TargetLayer, Targets

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Gptq(SecondOrder):
    """Quantize using the curvature of each layer's output error on calibration text.

    ``docs/calibrated-compression.md`` gives the reason for each default, with measurements; the published script's
    settings are ``clip=minmax desc_act=false``.

    Attributes:
        bits, group_size, symmetric, clip, scale_bits: the grid
            (:class:`~knowledge_compression.compression.solve.grid.Grid`).
        desc_act: round the columns in order of decreasing second moment rather than in their own order.
        static_groups: fix every group's grid beforehand, so that a group consists of neighbouring columns in any order
            of rounding; otherwise a group is a run of the rounding order, and its grid is chosen when it is reached.
        refine: rounds in which, after the sweep, scales and codes are improved in turn
            (:func:`~knowledge_compression.compression.solve.descent.descended`); 0 is GPTQ as published.
        block_size: columns whose errors are accumulated before they are applied to later blocks; affects the speed
            only.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    clip: str = "mse"
    scale_bits: int = SCALE_BITS
    desc_act: bool = True
    static_groups: bool = True
    refine: Annotated[int, Field(ge=0)] = 0
    block_size: Positive = field(default=128, metadata=SPEED)
    name = "gptq"

    def __post_init__(self) -> None:
        """Refuse an invalid damping or grid before anything is loaded."""
        super().__post_init__()
        _ = self.grid

    @property
    def grid(self) -> Grid:
        """The grid of these settings."""
        return Grid(self.bits, self.group_size, self.symmetric, self.clip, self.scale_bits)

    @property
    def coding(self) -> Coding:
        """Integers on the grid; groups are runs of the order of rounding unless they are fixed beforehand."""
        return self.grid.coding(in_order=self.static_groups or self.group_size is None or not self.desc_act)

    def stored_bits(self, layer: TargetLayer) -> int:
        """The bits that a layer will take, with scales and zero points."""
        return self.grid.stored_bits(layer)

    def check(self, targets: Targets) -> None:
        """Also refuse groups that do not fit a layer."""
        super().check(targets)
        self.grid.check(targets, whole=False)

    def solve(self, weight: Tensor, statistics: Hessian, heights: Sequence[int]) -> Solved:
        """Quantize the weight, using the Hessian of its inputs."""
        quantized, damping, fallbacks = self.quantize(weight, statistics.matrix, self.lacking(statistics))
        plain = plainly_rounded(weight, replace(self.grid, clip="minmax")).dequantize().to(weight)
        return Solved(quantized=quantized, plain=plain, damping=damping, fallbacks=fallbacks)

    def lacking(self, statistics: Hessian) -> Tensor | None:
        """What the inputs lack (:func:`~knowledge_compression.compression.solve.compensation.pull`), or None."""
        return None

    def quantize(
        self, weight: Tensor, hessian: Tensor, lacking: Tensor | None = None
    ) -> tuple[QuantizedWeight, float | None, list[str]]:
        """The algorithm itself, on tensors alone.

        Args:
            weight: float32 ``[out_features, in_features]``.
            hessian: mean second moments of the inputs, ``[in_features, in_features]``.
            lacking: what the inputs lack of those in the uncompressed network, see
                :func:`~knowledge_compression.compression.solve.compensation.pull`.

        Returns:
            The quantized weight, the relative damping used (None if it fell back to plain rounding), and the names of
            the fallbacks taken: ``dead_input``, ``damping_raised``, ``not_positive_definite``.
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
        pulls = None if lacking is None else pull(lacking, factor, order)
        compensate(turned, factor.upper, groups.round, block_size=self.block_size, pull=pulls, **in_turn)
        damping, fallbacks = factor.damping, factor.fallbacks
        del factor, pulls  # each is as large as the Hessian
        swept = groups.quantized(turned, order)
        refined = descended(weight, swept, hessian, damping=damping, rounds=self.refine, lacking=lacking)
        return refined, damping, fallbacks
