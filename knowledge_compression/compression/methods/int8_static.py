"""Static int8 quantization: activation ranges from calibration text (Namburi et al. 2023, section 6.2, PTSQ)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import LongTensor, Tensor

from knowledge_compression.compression.formats.int8_linear import GRANULARITIES, Int8Linear
from knowledge_compression.compression.layer_reports import CompressionReport, LayerReport
from knowledge_compression.compression.walk.blocks import LayerInputs, compress_calibrated
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, TargetLayer, Targets


class InputRange:
    """The least and the greatest input, of all channels together."""

    def __init__(self, device: torch.device) -> None:
        self.least = torch.zeros((), device=device)
        self.greatest = torch.zeros((), device=device)

    def update(self, inputs: LayerInputs) -> None:
        """Take in a batch."""
        least, greatest = torch.aminmax(inputs.values.float())
        self.least, self.greatest = torch.minimum(self.least, least), torch.maximum(self.greatest, greatest)


class StaticInt8Linear(Int8Linear):
    """An int8 layer that rounds its inputs to 7 bits over a range fixed beforehand, as torch's static layers do.

    Args:
        weight, bias, granularity: as :class:`Int8Linear` takes them; the granularity is that of the weights.
        least, greatest: the ends of the range, scalars; zero lies inside it.

    Attributes:
        input_scale, input_zero: buffers, scalars: an input is ``input_scale * (integer - input_zero)``.
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

    def round_inputs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Integers 0 to 127 of float32 inputs, and the scale and zero point, which are always the same."""
        integers = (rows / self.input_scale).round_().add_(self.input_zero).clamp_(0, 127).to(torch.int8)
        return integers, self.input_scale, self.input_zero


@dataclass(frozen=True)
class Int8Static:
    """Put int8 layers in the place of the targets that round their inputs to a range fixed beforehand.

    The range of a layer's inputs is all that the calibration text shows of them, zero included; what lies outside later
    is cut off. A row's answer does not depend on its batch.

    Attributes:
        granularity: ``per_channel`` (one scale a weight row) or ``per_tensor`` (one a weight).
        forward_dtype, device: see ``walk.blocks.compress_blocks``.
    """

    granularity: str = "per_channel"
    forward_dtype: str = "auto"
    device: str | None = None
    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a granularity that does not exist."""
        if self.granularity not in GRANULARITIES:
            raise BadInput(f"granularity={self.granularity} does not exist; choose one of {', '.join(GRANULARITIES)}")

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None) -> CompressionReport:
        """Replace the targets in the network."""
        return compress_calibrated("int8_static", self, model, targets, calibration)

    def observe(self, in_features: int, device: torch.device) -> InputRange:
        """The range that all linears with one input share."""
        return InputRange(device)

    def shrink(self, layers: Sequence[TargetLayer], statistics: InputRange) -> list[LayerReport]:
        """Replace linears that read the same inputs."""
        reports = []
        for layer in layers:
            start = time.perf_counter()
            static = StaticInt8Linear(
                layer.weight, layer.module.bias, self.granularity, statistics.least, statistics.greatest
            )
            report = LayerReport.of(layer, bits=8.0)
            report.overhead_bits = 32 * (static.weight_scale.numel() + 2)
            layer.replace(static)
            report.seconds = time.perf_counter() - start
            reports.append(report)
        return reports
