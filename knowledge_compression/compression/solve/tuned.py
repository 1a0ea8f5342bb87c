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
        self._scales, self._zeros = start.grid.scales.to(place), start.grid.zeros.to(place, torch.float32)
        self._factors = torch.ones_like(self._scales)
        codes = start.codes.to(place, torch.float32)
        wanted = dense.float() / self._columns(self._scales) + self._columns(self._zeros)
        self._first = torch.minimum(torch.maximum(wanted, codes - _INSIDE), codes + _INSIDE)
        self._places = self._first.clone()

    def weight(self) -> Tensor:
        """The current weight on its grid, float32 ``[out_features, in_features]``."""
        return self._levels().mul_(self._columns(self._stored()))

    def follow(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Move by one step against the signs of the gradients.

        Args:
            gradient: gradient of the loss with respect to the weight, ``[out_features, in_features]``.
            rate: how far a place moves, in steps of its grid.
            scale_rate: how far a scale moves, relative to its first value.
        """
        gradient = gradient.float()
        towards = torch.zeros_like(self._factors).index_add_(1, self._group_of, self._levels().mul_(gradient))
        self._factors.sub_(towards.sign_(), alpha=scale_rate)
        self._places.sub_(gradient.sign(), alpha=rate)
        torch.maximum(torch.minimum(self._places, self._first + REACH), self._first - REACH, out=self._places)

    def quantized(self) -> QuantizedWeight:
        """The current codes and grid."""
        grid = replace(self._grid, scales=self._stored().cpu())
        return QuantizedWeight(self._codes().to("cpu", torch.uint8).contiguous(), grid)

    def _codes(self) -> Tensor:
        return self._places.round().clamp_(0, 2**self._grid.bits - 1)

    def _levels(self) -> Tensor:
        return self._codes().sub_(self._columns(self._zeros))

    def _stored(self) -> Tensor:
        return storable(self._scales * self._factors, float_of(self._grid.scale_bits))

    def _columns(self, values: Tensor) -> Tensor:
        return spread(values, self._group_of, 1)
