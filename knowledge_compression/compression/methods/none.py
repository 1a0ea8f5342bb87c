"""No compression: the dense baseline that every comparison shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import LongTensor

from knowledge_compression.compression.base import reporting
from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.models import Model, Targets


@dataclass(frozen=True)
class NoCompression:
    """Leave the model as it is."""

    calibrated: ClassVar[bool] = False

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None) -> CompressionReport:
        """Touch nothing and report the model's size."""
        with reporting("none", model, targets) as report:
            pass
        return report
