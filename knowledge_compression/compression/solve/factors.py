"""Factors of a rounded weight's scales that follow their gradients; its codes stay."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from knowledge_compression.compression.solve.grid import QuantizedWeight, float_of, storable
from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

_DECAYS = 0.9, 0.95  # of the running means of the gradient and of its square


class TunedScales:
    """A weight on its grid, whose scales are multiplied by factors that Adam tunes (Kingma & Ba 2015, algorithm 1).

    Args:
        start: the rounded weight to begin with.
        place: the device on which the factors are kept.
    """

    def __init__(self, start: QuantizedWeight, place: torch.device) -> None:
        self._start = start
        self._group_of = start.grid.group_of.to(place, torch.int64)
        self.factors = torch.ones_like(start.grid.scales, device=place)
        self._mean, self._square = torch.zeros_like(self.factors), torch.zeros_like(self.factors)
        self._steps = 0

    def gradient(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Of the loss by the factors, float32 ``[out_features, groups]``.

        Args:
            weight: as it is, ``[out_features, in_features]``.
            gradient: of the loss by the weight, of the same shape.
        """
        by_column = weight.float() * gradient.float()
        return torch.zeros_like(self.factors).index_add_(1, self._group_of, by_column) / self.factors

    def follow(self, gradient: Tensor, rate: float) -> None:
        """Move by one step of Adam.

        Args:
            gradient: of the loss by the factors.
            rate: how far a factor moves while the signs of its gradients agree.
        """
        self._steps += 1
        for kept, new, decay in zip((self._mean, self._square), (gradient, gradient.square()), _DECAYS, strict=True):
            kept.lerp_(new, 1 - decay)
        mean, square = (
            kept / (1 - decay**self._steps) for kept, decay in zip((self._mean, self._square), _DECAYS, strict=True)
        )
        self.factors.addcdiv_(mean, square.sqrt_().add_(1e-30), value=-rate).clamp_(min=0.5, max=2)

    def quantized(self) -> QuantizedWeight:
        """The codes, with the scales as they now are."""
        grid = self._start.grid
        scales = storable(grid.scales * self.factors.cpu(), float_of(grid.scale_bits))
        return QuantizedWeight(self._start.codes, replace(grid, scales=scales))
