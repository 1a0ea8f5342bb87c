"""No compression: the dense baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.compression.base import Method
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.models import Model, Targets

if TYPE_CHECKING:
    from torch import LongTensor


@dataclass(frozen=True)
class NoCompression(Method):
    """Leave the model unchanged."""

    name = "none"
    streams = False  # nothing to write

    def apply(self, model: Model, targets: Targets, calibration: LongTensor | None) -> list[LayerReport]:
        """Touch nothing."""
        return []
