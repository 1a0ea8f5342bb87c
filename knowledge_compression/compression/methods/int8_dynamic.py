"""Dynamic int8 quantization: weights once, activations as they come (Namburi et al. 2023, section 3.2, PTDQ)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from torch import LongTensor

from knowledge_compression.compression.base import reporting
from knowledge_compression.compression.formats.int8_linear import GRANULARITIES, Int8Linear
from knowledge_compression.compression.layer_reports import CompressionReport, LayerReport
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Targets


@dataclass(frozen=True)
class Int8Dynamic:
    """Put int8 layers in the place of the targets.

    Attributes:
        granularity: ``per_tensor`` (the paper's ``torch.ao.quantization.quantize_dynamic``: one scale a weight and one
            a batch of activations) or ``per_channel`` (one a weight row and one a token; independent of the batch).
        and_final: take the final layer in as well, as published quantization of everything does.
    """

    granularity: str = "per_tensor"
    and_final: bool = False
    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a granularity that does not exist before anything is loaded."""
        if self.granularity not in GRANULARITIES:
            raise BadInput(f"granularity={self.granularity} does not exist; choose one of {', '.join(GRANULARITIES)}")

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None) -> CompressionReport:
        """Replace the targets in the network."""
        if self.and_final:
            targets = targets.with_final()
        with reporting("int8_dynamic", model, targets) as report:
            for layer in targets:
                start = time.perf_counter()
                quantized = Int8Linear.of(layer.module, self.granularity)
                scales = quantized.weight_scale
                overhead = scales.numel() * scales.element_size() * 8
                seconds = time.perf_counter() - start
                report.layers.append(LayerReport.of(layer, bits=8.0, overhead_bits=overhead, seconds=seconds))
                layer.replace(quantized)
        return report
