"""MXFP4: weights as 4-bit floats with a power of two per 32 inputs (OCP Microscaling Formats v1.0); needs no text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.coding import MXFP4, Coding
from knowledge_compression.compression.solve.floats import coding_of, mxfp4
from knowledge_compression.models import TargetLayer


@dataclass(frozen=True)
class Mxfp4(Layerwise):
    """Divide each block of 32 weights by a power of two, and round to E2M1.

    Attributes:
        scale: how the power of two follows from the block's largest magnitude: ``floor`` (section 6.3 of the
            specification; torchao, ggml) or ``even`` (the magnitude is rounded to one bit of mantissa before, so that
            one close to the next power of two does not have to become 6 times the scale; compressed-tensors).
    """

    scale: Literal["floor", "even"] = "floor"
    name = "mxfp4"

    @property
    def coding(self) -> Coding:
        """E2M1 and E8M0."""
        return coding_of(MXFP4, (1, 32))

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Round the layer in place."""
        rounded = mxfp4(layer.weight, to_even=self.scale == "even")
        rounded.put_into(layer)
        return rounded.report(layer)
