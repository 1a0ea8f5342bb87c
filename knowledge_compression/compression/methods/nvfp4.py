"""NVFP4: weights as 4-bit floats with an E4M3 scale per 16 inputs and a float32 one per weight; needs no text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.compression.small_floats import SmallFloats
from knowledge_compression.compression.solve.coding import NVFP4
from knowledge_compression.compression.solve.floats import FloatWeight, nvfp4

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Nvfp4(SmallFloats):
    """Divide each block of 16 weights by its scale, which is itself rounded to E4M3, and round to E2M1."""

    name = "nvfp4"
    kind = NVFP4
    block = (1, 16)

    def rounded(self, weight: Tensor) -> FloatWeight:
        """E2M1 and E4M3."""
        return nvfp4(weight)
