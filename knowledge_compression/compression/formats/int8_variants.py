"""Int8 layers that use a property of their inputs fixed beforehand: the range of all, or the size of each channel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.compression.formats.int8_linear import Int8Linear, quantize_tokens
from knowledge_compression.compression.solve.int8 import INPUT_STEPS, Int8Weight


class StaticInt8Linear(Int8Linear):
    """An int8 layer that rounds its inputs to 7 bits over a fixed range, as torch's static layers do.

    Args:
        weight, bias, granularity: as :class:`Int8Linear` takes them; the granularity is that of the weights.
        least, greatest: the ends of the range, scalars; zero lies inside it.

    Attributes:
        input_scale, input_zero: scalar buffers: an input is ``input_scale * (integer - input_zero)``.
    """

    input_scale: Tensor
    input_zero: Tensor

    def __init__(self, weight: Tensor, bias: Any, granularity: str, least: Tensor, greatest: Tensor) -> None:
        super().__init__(weight, bias, granularity)
        self.weight_sum = self.weight_int8.sum(1, dtype=torch.int32)
        span = greatest - least
        scale = torch.where(span > 0, span / 127, torch.ones_like(span)).to(weight.device)
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_zero", (-least.to(scale) / scale).round().clamp(0, 127).to(torch.int32))

    @property
    def coded(self) -> Int8Weight | None:
        """The integers, and the range of the inputs, on the CPU; None if the rows share one scale."""
        dynamic = super().coded
        return dynamic and replace(dynamic, input_scale=self.input_scale.cpu(), input_zero=self.input_zero.cpu())

    @property
    def overhead_bits(self) -> int:
        """Bits of the scales, and of the inputs' scale and zero point."""
        return super().overhead_bits + 2 * 32

    def round_inputs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The integers 0 to 127 of float32 inputs, and the fixed scale and zero point."""
        integers = (rows / self.input_scale).round_().add_(self.input_zero).clamp_(0, 127).to(torch.int8)
        return integers, self.input_scale, self.input_zero


class SmoothedInt8Linear(Int8Linear):
    """An int8 layer whose inputs are divided, and whose weights are multiplied, by a factor per channel.

    Args:
        weight, bias: as :class:`Int8Linear` takes them, before they are multiplied.
        divisor: float32 ``[in_features]``, positive.
        input_steps: as :class:`Int8Linear` takes it.

    Attributes:
        input_factor: buffer, the reciprocal of the divisor.
    """

    input_factor: Tensor

    def __init__(self, weight: Tensor, bias: Any, divisor: Tensor, input_steps: float = INPUT_STEPS[0]) -> None:
        super().__init__(weight.float() * divisor, bias, "per_channel", input_steps)
        self.dtype = weight.dtype
        self.register_buffer("input_factor", divisor.reciprocal())

    @property
    def coded(self) -> None:
        """None, because the inputs are divided here."""

    @property
    def overhead_bits(self) -> int:
        """Bits for the scales and the divisor."""
        return super().overhead_bits + 32 * self.in_features

    @property
    def weight(self) -> Tensor:
        """The weights that the integers represent, for undivided inputs, ``[out_features, in_features]``."""
        return (self.weight_int8 * self.weight_scale[:, None] * self.input_factor).to(self.dtype)

    def round_inputs(self, rows: Tensor) -> tuple[Tensor, Tensor, None]:
        """The integers of the divided inputs, and a scale per row."""
        return *quantize_tokens(rows * self.input_factor, self.input_steps), None
