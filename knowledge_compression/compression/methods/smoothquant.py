"""SmoothQuant: int8 weights and activations, with outlier channels scaled into the weights (Xiao et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.compression.calibrated import Calibrated, Solved
from knowledge_compression.compression.walk.statistics import LayerInputs, Statistics
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor

    from knowledge_compression.compression.formats.int8_variants import SmoothedInt8Linear
    from knowledge_compression.models.replaced import ReplacedLinear


class LargestInputs(Statistics):
    """The largest magnitude of each input channel."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.largest = torch.zeros(in_features, device=device)

    def update(self, inputs: LayerInputs) -> None:
        """Add a batch."""
        self.largest = torch.maximum(self.largest, inputs.values.float().abs().amax(0))


@dataclass(frozen=True)
class SmoothQuant(Calibrated[LargestInputs]):
    """Replace the targets by int8 layers that divide their inputs, channel by channel, before rounding them.

    Linears that read the same inputs share one divisor, ``max|X_j|^alpha / max|W_j|^(1 - alpha)`` (eq. 4). The
    published code folds it into the preceding norm; here each layer divides by it, which gives the same product.
    Activations are rounded per token at run time (the paper's O1), weights per row.

    Attributes:
        alpha: migration strength: how much of the outliers is moved into the weights, in [0, 1].
    """

    alpha: float = 0.5
    name = "smoothquant"

    def __post_init__(self) -> None:
        """Refuse an alpha outside [0, 1]."""
        if not 0.0 <= self.alpha <= 1.0:
            raise BadInput(f"compression.alpha={self.alpha} is out of range; it must lie in [0, 1], e.g. 0.5")

    @property
    def modules(self) -> tuple[type[ReplacedLinear], ...]:
        """Int8 layers with a divisor."""
        from knowledge_compression.compression.formats.int8_variants import SmoothedInt8Linear

        return (SmoothedInt8Linear,)

    def observe(self, in_features: int, device: torch.device) -> LargestInputs:
        """The channel maxima that all linears with one input share."""
        return LargestInputs(in_features, device)

    def solve(self, weight: Tensor, statistics: LargestInputs, heights: Sequence[int]) -> Solved:
        """Replace the linears by int8 layers that share one divisor."""
        from knowledge_compression.compression.formats.int8_variants import SmoothedInt8Linear

        divisor, dead = self.divisor(weight, statistics.largest)

        def module(layer: TargetLayer) -> SmoothedInt8Linear:
            return SmoothedInt8Linear(layer.weight, layer.bias_parameter, divisor.to(layer.weight.device))

        return Solved(module=module, fallbacks=["dead_input"] * dead)

    def divisor(self, weight: Tensor, largest: Tensor) -> tuple[Tensor, bool]:
        """The divisor of each input channel.

        Args:
            weight: the stacked weights of all linears that read these inputs, ``[out_features, in_features]``.
            largest: the largest magnitude of each input channel, ``[in_features]``.

        Returns:
            The divisors, float32 ``[in_features]``, and whether any channel is dead and so left undivided.
        """
        heaviest = weight.float().abs().amax(0)
        alive = (largest > 0) & (heaviest > 0)
        divisor = largest.pow(self.alpha) / heaviest.pow(1 - self.alpha)
        return torch.where(alive, divisor.clamp(min=1e-5), 1.0), not bool(alive.all())
