"""Wanda: each output keeps the weights of largest magnitude times input norm (Sun et al. 2024, eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.compression.base import Patterned, check_sparsity
from knowledge_compression.compression.calibrated import Calibrated, Solved
from knowledge_compression.compression.walk.statistics import LayerInputs, Statistics
from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor


class InputPower(Statistics):
    """Mean square of each input feature over the tokens of the calibration text."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, device=device)
        self._tokens = 0

    def update(self, inputs: LayerInputs) -> None:
        """Add a batch."""
        self._sum += inputs.values.float().square().sum(0)
        self._tokens += len(inputs.values)

    @property
    def mean(self) -> Tensor:
        """Float32 ``[in_features]``."""
        return self._sum / max(self._tokens, 1)


@dataclass(frozen=True)
class Wanda(Patterned, Calibrated[InputPower]):
    """Remove the weights with the smallest ``|w| ‖x‖`` from every output row; the others are unchanged.

    Attributes:
        sparsity: share of each row's weights to remove, in [0, 1).
        pattern: ``n:m``, e.g. ``2:4``: keep n of every m neighbouring inputs; the sparsity is then that of the pattern.
    """

    sparsity: float
    pattern: str | None = None
    name = "wanda"

    def __post_init__(self) -> None:
        """Refuse invalid settings before anything is loaded."""
        check_sparsity(self.sparsity)
        _ = self.shape

    def observe(self, in_features: int, device: torch.device) -> InputPower:
        """The norms that all linears with one input share."""
        return InputPower(in_features, device)

    def solve(self, weight: Tensor, statistics: InputPower, heights: Sequence[int]) -> Solved:
        """Choose the weights to remove, using the norms of the inputs."""
        power = statistics.mean
        return Solved(removed=self.removes(weight, power), fallbacks=["dead_input"] * bool((power == 0).any()))

    def removes(self, weight: Tensor, power: Tensor) -> Tensor:
        """The algorithm itself: the mask of removed weights, bool ``[out, in]``, from the mean squares ``[in]``."""
        scores = weight.float().abs() * power.sqrt()
        if self.shape:
            return self.shape.removes(scores)
        order = scores.argsort(dim=1, stable=True)[:, : round(self.sparsity * weight.shape[1])]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
