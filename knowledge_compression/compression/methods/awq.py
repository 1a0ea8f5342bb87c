"""AWQ: weights that multiply large activations are rounded on a finer grid (Lin et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.compression.calibrated import Calibrated, Solved
from knowledge_compression.compression.solve.grid import SCALE_BITS, Grid, plainly_rounded
from knowledge_compression.compression.solve.hessian import Hessian
from knowledge_compression.compression.walk.statistics import LayerInputs
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import Targets

if TYPE_CHECKING:
    from torch import Tensor


class InputSizes(Hessian):
    """Second moments of the inputs, which weight a layer's output error, and the mean magnitude of each channel."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._magnitudes = torch.zeros(in_features, device=device)
        self._tokens = 0

    def update(self, inputs: LayerInputs) -> None:
        """Add a batch."""
        super().update(inputs)
        self._magnitudes += inputs.values.float().abs().sum(0)
        self._tokens += len(inputs.values)

    @property
    def magnitudes(self) -> Tensor:
        """The mean magnitude of each input channel, float32 ``[in_features]``."""
        return self._magnitudes / max(self._tokens, 1)


@dataclass(frozen=True)
class Awq(Calibrated[InputSizes]):
    """Multiply each input channel's weights by a power of its mean activation, round, and divide by it again.

    Linears that read the same inputs share the power: of ``steps`` values between 0 (plain rounding) and 1, the one
    with the least output error on the calibration text (eq. 4 and 5). The published code folds the factors into the
    preceding norm; here the weights are divided by them, which gives the same product.

    Attributes:
        bits, group_size, symmetric: the grid (:class:`~knowledge_compression.compression.solve.grid.Grid`).
        steps: number of powers tried.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    steps: int = 20
    name = "awq"

    def __post_init__(self) -> None:
        """Refuse a search over no powers."""
        if self.steps < 1:
            raise BadInput(f"compression.steps={self.steps} is not a number of powers to try; choose e.g. 20")
        _ = self.grid

    @property
    def grid(self) -> Grid:
        """The grid that was asked for."""
        return Grid(self.bits, self.group_size, self.symmetric)

    def check(self, targets: Targets) -> None:
        """Refuse groups that do not fit a layer."""
        self.grid.check(targets, whole=False)

    def observe(self, in_features: int, device: torch.device) -> InputSizes:
        """The statistics that all linears with one input share."""
        return InputSizes(in_features, device)

    def solve(self, weight: Tensor, statistics: InputSizes, heights: Sequence[int]) -> Solved:
        """Round the weight with the power that gives the least output error."""
        inputs = weight.shape[1]
        width = self.grid.width(inputs)
        dead = bool((statistics.magnitudes <= 0).any())
        a_scale = SCALE_BITS + (0 if self.symmetric else self.bits)
        return Solved(
            weight=self.rounded(weight, statistics.matrix, statistics.magnitudes),
            plain=plainly_rounded(weight, self.grid).dequantize().to(weight),
            bits=float(self.bits),
            overhead_bits=(math.ceil(inputs / width) * a_scale, SCALE_BITS * inputs),
            fallbacks=["dead_input"] * dead + ["short_group"] * (inputs % width > 0),
        )

    def rounded(self, weight: Tensor, hessian: Tensor, magnitudes: Tensor) -> Tensor:
        """The algorithm itself, on tensors alone.

        Args:
            weight: float32 ``[out_features, in_features]``.
            hessian: mean second moments of the inputs, ``[in_features, in_features]``.
            magnitudes: mean magnitude of each input, ``[in_features]``; a dead input keeps the factor 1.

        Returns:
            The rounded weight, of the same shape.
        """
        alive = magnitudes > 0
        if not bool(alive.any()):
            return plainly_rounded(weight, self.grid).dequantize().to(weight)
        best, least = weight, torch.inf
        for step in range(self.steps):
            factors = torch.where(alive, magnitudes, 1.0).pow(step / self.steps).clamp(min=1e-4)
            factors = torch.where(alive, factors / (factors[alive].max() * factors[alive].min()).sqrt(), 1.0)
            read = self.grid.nearest(weight * factors) / factors
            error = read - weight
            loss = float(((error @ hessian) * error).sum())
            if loss < least:
                best, least = read, loss
        return best
