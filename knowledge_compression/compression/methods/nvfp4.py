"""NVFP4: weights as 4-bit floats with an E4M3 scale per 16 inputs and a float32 one per weight; needs no text."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.coding import NVFP4, Coding
from knowledge_compression.compression.solve.floats import coding_of, nvfp4
from knowledge_compression.models import TargetLayer


@dataclass(frozen=True)
class Nvfp4(Layerwise):
    """Divide each block of 16 weights by its scale, which is itself rounded to E4M3, and round to E2M1."""

    name = "nvfp4"

    @property
    def coding(self) -> Coding:
        """E2M1 and E4M3."""
        return coding_of(NVFP4, (1, 16))

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Round the layer in place."""
        rounded = nvfp4(layer.weight)
        rounded.put_into(layer)
        return rounded.report(layer)
