"""Codes and scales of a rounded weight that follow the signs of their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from knowledge_compression.compression.solve.grid import QuantizedWeight, float_of, spread, storable
from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

REACH = 0.5  # how far a weight's place on its grid may move, in steps of the grid
_INSIDE = 0.49  # the largest distance of a place from its code at the start


class TunedRounding:
    """A weight on its grid, whose codes and scales follow the signs of their gradients.

    Each weight has a *place* on its grid, a real number, and its code is the place rounded. The gradient ignores the
    rounding (straight-through estimator), as in SignRound (Cheng et al. 2024, eq. 3 to 5): the sign of a place's
    gradient is that of the weight's, and a scale's is the sum over its group of gradient times code.

    Args:
        start: the rounded weight to begin with.
        dense: the weight before rounding, ``[out_features, in_features]``. A place begins where this lies on the grid,
            or at the nearest edge of the range of the start's code.
    """

    def __init__(self, start: QuantizedWeight, dense: Tensor) -> None:
        self._grid, place = start.grid, dense.device
        self._group_of = start.grid.group_of.to(place, torch.int64)
        groups = start.grid.scales.shape[1]
        equal = torch.arange(groups, device=place).repeat_interleave(dense.shape[1] // groups)
        self._regular = torch.equal(self._group_of, equal)
        # Equal groups, in the order of the columns, have an axis: scales broadcast, and nothing is gathered.
        self._shape = (len(dense), groups, -1) if self._regular else tuple(dense.shape)
        self._scales, self._zeros = start.grid.scales.to(place), start.grid.zeros.to(place, torch.float32)
        self._factors = torch.ones_like(self._scales)
        codes = start.codes.to(place, torch.float32).view(self._shape)
        wanted = dense.float().reshape(self._shape) / self._columns(self._scales) + self._columns(self._zeros)
        self._places = torch.minimum(torch.maximum(wanted, codes - _INSIDE), codes + _INSIDE)
        self._bounds = self._places - REACH, self._places + REACH
        self._levels = torch.empty_like(self._places)
        self._round()

    def weight(self) -> Tensor:
        """The current weight on its grid, float32 ``[out_features, in_features]``."""
        return (self._levels * self._columns(self._stored())).flatten(1)

    def follow(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Move by one step against the signs of the gradients.

        Args:
            gradient: gradient of the loss with respect to the weight, ``[out_features, in_features]``; not needed
                afterwards, its memory may be used.
            rate: how far a place moves, in steps of its grid.
            scale_rate: how far a scale moves, relative to its first value.
        """
        gradient = gradient.float().reshape(self._shape)
        self._factors.sub_(self._by_group(self._levels.mul_(gradient)).sign_(), alpha=scale_rate)
        self._places.sub_(gradient.sign_(), alpha=rate)
        torch.clamp(self._places, *self._bounds, out=self._places)
        self._round()

    def quantized(self) -> QuantizedWeight:
        """The current codes and grid."""
        grid = replace(self._grid, scales=self._stored().cpu())
        codes = (self._levels + self._columns(self._zeros)).flatten(1)
        return QuantizedWeight(codes.to("cpu", torch.uint8).contiguous(), grid)

    def _round(self) -> None:
        """Codes less zero points, of the current places."""
        torch.round(self._places, out=self._levels)
        self._levels.clamp_(0, 2**self._grid.bits - 1).sub_(self._columns(self._zeros))

    def _stored(self) -> Tensor:
        return storable(self._scales * self._factors, float_of(self._grid.scale_bits))

    def _columns(self, values: Tensor) -> Tensor:
        """Values of the groups in a form that broadcasts over the columns."""
        return values[..., None] if self._regular else spread(values, self._group_of, 1)

    def _by_group(self, values: Tensor) -> Tensor:
        """The sum over each group's columns, ``[out_features, groups]``."""
        if self._regular:
            return values.sum(-1)
        return torch.zeros_like(self._factors).index_add_(1, self._group_of, values)
