"""Static int8 quantization: activation ranges from calibration text (Namburi et al. 2023, section 6.2, PTSQ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.compression.calibrated import Calibrated, Solved
from knowledge_compression.compression.formats.int8_linear import Int8Linear, check_granularity
from knowledge_compression.compression.walk.blocks import LayerInputs, Statistics
from knowledge_compression.models import TargetLayer


class InputRange(Statistics):
    """The smallest and the largest input over all channels."""

    def __init__(self, device: torch.device) -> None:
        self.least = torch.zeros((), device=device)
        self.greatest = torch.zeros((), device=device)

    def update(self, inputs: LayerInputs) -> None:
        """Add a batch."""
        least, greatest = torch.aminmax(inputs.values.float())
        self.least, self.greatest = torch.minimum(self.least, least), torch.maximum(self.greatest, greatest)


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
    def overhead_bits(self) -> int:
        """Bits of the scales, and of the inputs' scale and zero point."""
        return super().overhead_bits + 2 * 32

    def round_inputs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The integers 0 to 127 of float32 inputs, and the fixed scale and zero point."""
        integers = (rows / self.input_scale).round_().add_(self.input_zero).clamp_(0, 127).to(torch.int8)
        return integers, self.input_scale, self.input_zero


@dataclass(frozen=True)
class Int8Static(Calibrated[InputRange]):
    """Replace the targets by int8 layers whose inputs are rounded over a range fixed by calibration.

    The range of a layer's inputs spans everything seen on the calibration text, and zero; later inputs outside it are
    clipped. A row's result does not depend on its batch.

    Attributes:
        granularity: ``per_channel`` (one scale per weight row) or ``per_tensor`` (one per weight matrix).
    """

    granularity: str = "per_channel"
    name = "int8_static"
    modules = (StaticInt8Linear,)

    def __post_init__(self) -> None:
        """Refuse an unknown granularity."""
        check_granularity(self.granularity)

    def observe(self, in_features: int, device: torch.device) -> InputRange:
        """The range that all linears with one input share."""
        return InputRange(device)

    def solve(self, weight: Tensor, statistics: InputRange, heights: Sequence[int]) -> Solved:
        """Replace the linears by int8 layers with this range."""
        seen = statistics.least, statistics.greatest

        def module(layer: TargetLayer) -> StaticInt8Linear:
            return StaticInt8Linear(layer.weight, layer.bias_parameter, self.granularity, *seen)

        return Solved(module=module)
