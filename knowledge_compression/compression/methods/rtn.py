"""Round to nearest: the plain rounding of weights that every calibrated quantization is measured against."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from torch import LongTensor

from knowledge_compression.compression.base import reporting
from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.compression.solve.grid import Grid, plainly_rounded, quantized_report
from knowledge_compression.models import Model, Targets


@dataclass(frozen=True)
class Rtn:
    """Round every weight to the nearest point of its row's (or group's) grid; needs no text.

    Attributes:
        bits, group_size, symmetric, clip, scale_bits: the grid
            (:class:`~knowledge_compression.compression.solve.grid.Grid`).
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    clip: str = "minmax"
    scale_bits: int = 32
    calibrated: ClassVar[bool] = False
    layerwise: ClassVar[bool] = True

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None) -> CompressionReport:
        """Quantize the targets in place."""
        grid = Grid(self.bits, self.group_size, self.symmetric, self.clip, self.scale_bits)
        grid.check(targets, whole=False)
        with reporting("rtn", model, targets) as report:
            for layer in targets:
                start = time.perf_counter()
                rounded = plainly_rounded(layer.weight, grid)
                rounded.put_into(layer)
                report.layers.append(quantized_report(layer, rounded, time.perf_counter() - start))
        return report
