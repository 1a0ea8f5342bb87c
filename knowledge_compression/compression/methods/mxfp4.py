"""MXFP4: weights as 4-bit floats with a power of two per 32 inputs (OCP Microscaling Formats v1.0); needs no text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from knowledge_compression.compression.small_floats import SmallFloats
from knowledge_compression.compression.solve.coding import MXFP4
from knowledge_compression.compression.solve.floats import FloatWeight, mxfp4

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mxfp4(SmallFloats):
    """Divide each block of 32 weights by a power of two, and round to E2M1.

    Attributes:
        scale: how the power of two follows from the block's largest magnitude: ``floor`` (section 6.3 of the
            specification; torchao, ggml) or ``even`` (the magnitude is first rounded to one bit of mantissa, so that a
            magnitude close to the next power of two is not clipped to 6 times the scale; compressed-tensors).
    """

    scale: Literal["floor", "even"] = "floor"
    name = "mxfp4"
    kind = MXFP4
    block = (1, 32)

    def rounded(self, weight: Tensor) -> FloatWeight:
        """E2M1 and E8M0."""
        return mxfp4(weight, to_even=self.scale == "even")
