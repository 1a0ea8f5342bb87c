"""SmoothQuant: int8 weights and activations, outlying channels moved into the weights (Xiao et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.compression.calibrated import Calibrated, Solved
from knowledge_compression.compression.formats.int8_linear import Int8Linear, quantize_tokens
from knowledge_compression.compression.walk.blocks import LayerInputs, Statistics
from knowledge_compression.errors import BadInput
from knowledge_compression.models import TargetLayer


class LargestInputs(Statistics):
    """The largest magnitude of each input channel."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.largest = torch.zeros(in_features, device=device)

    def update(self, inputs: LayerInputs) -> None:
        """Take in a batch."""
        self.largest = torch.maximum(self.largest, inputs.values.float().abs().amax(0))


class SmoothedInt8Linear(Int8Linear):
    """An int8 layer whose inputs are divided, and whose weights multiplied, channel by channel.

    Args:
        weight, bias: as :class:`Int8Linear` takes them, before they are multiplied.
        divisor: float32 ``[in_features]``, positive.

    Attributes:
        input_factor: buffer, one over the divisor.
    """

    input_factor: Tensor

    def __init__(self, weight: Tensor, bias: Any, divisor: Tensor) -> None:
        super().__init__(weight.float() * divisor, bias, "per_channel")
        self.dtype = weight.dtype
        self.register_buffer("input_factor", divisor.reciprocal())

    @property
    def overhead_bits(self) -> int:
        """Bits of the scales and the divisor."""
        return super().overhead_bits + 32 * self.in_features

    @property
    def weight(self) -> Tensor:
        """The weights that the integers stand for, for inputs as they come, ``[out_features, in_features]``."""
        return (self.weight_int8 * self.weight_scale[:, None] * self.input_factor).to(self.dtype)

    def round_inputs(self, rows: Tensor) -> tuple[Tensor, Tensor, None]:
        """Integers of the divided inputs, and a scale for each row."""
        return *quantize_tokens(rows * self.input_factor), None


@dataclass(frozen=True)
class SmoothQuant(Calibrated[LargestInputs]):
    """Put int8 layers in the place of the targets that divide their inputs, channel by channel, before they round them.

    Linears that read the same inputs share one divisor, ``max|X_j|^alpha / max|W_j|^(1 - alpha)`` (eq. 4), so that it
    could be folded into the norm before them; here each layer divides by it, which is the same product. Activations are
    rounded token by token as they come (the paper's O1), weights row by row.

    Attributes:
        alpha: how much of the outliers moves into the weights, in [0, 1].
    """

    alpha: float = 0.5
    name = "smoothquant"
    modules = (SmoothedInt8Linear,)

    def __post_init__(self) -> None:
        """Refuse shares outside [0, 1]."""
        if not 0.0 <= self.alpha <= 1.0:
            raise BadInput(f"compression.alpha={self.alpha} is not a share; it must lie in [0, 1], e.g. 0.5")

    def observe(self, in_features: int, device: torch.device) -> LargestInputs:
        """The channel maxima that all linears with one input share."""
        return LargestInputs(in_features, device)

    def solve(self, weight: Tensor, statistics: LargestInputs, heights: Sequence[int]) -> Solved:
        """Replace the linears by int8 layers that divide by what suits all of them."""
        divisor, dead = self.divisor(weight, statistics.largest)

        def module(layer: TargetLayer) -> SmoothedInt8Linear:
            return SmoothedInt8Linear(layer.weight, layer.module.bias, divisor.to(layer.weight.device))

        return Solved(module=module, fallbacks=["dead_input"] * dead)

    def divisor(self, weight: Tensor, largest: Tensor) -> tuple[Tensor, bool]:
        """What the inputs are divided by.

        Args:
            weight: of all linears that read these inputs, ``[out_features, in_features]``.
            largest: the largest magnitude of each input channel, ``[in_features]``.

        Returns:
            The divisors, float32 ``[in_features]``, and whether a channel, being dead, was left as it is.
        """
        heaviest = weight.float().abs().amax(0)
        alive = (largest > 0) & (heaviest > 0)
        divisor = largest.pow(self.alpha) / heaviest.pow(1 - self.alpha)
        return torch.where(alive, divisor.clamp(min=1e-5), 1.0), not bool(alive.all())
