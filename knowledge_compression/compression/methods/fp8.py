"""FP8: weights as 8-bit floats (E4M3) with shared scales (Micikevicius et al. 2022); needs no text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from knowledge_compression.building import Positive
from knowledge_compression.compression.small_floats import SmallFloats
from knowledge_compression.compression.solve.coding import FP8
from knowledge_compression.compression.solve.floats import Block, FloatWeight, fp8

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Fp8(SmallFloats):
    """Divide each block of weights by a float32 scale so that its largest magnitude is 448, and round to E4M3.

    Attributes:
        granularity: ``channel`` (a scale per output), ``tensor`` (one per weight), or ``block`` (one per square, as in
            DeepSeek-V3).
        block_size: outputs and inputs of a square.
    """

    granularity: Literal["channel", "tensor", "block"] = "channel"
    block_size: Positive = 128
    name = "fp8"
    kind = FP8

    @property
    def block(self) -> Block:
        """Outputs and inputs that share a scale."""
        blocks: dict[str, Block] = {"channel": (1, None), "tensor": (None, None)}
        return blocks.get(self.granularity, (self.block_size, self.block_size))

    def rounded(self, weight: Tensor) -> FloatWeight:
        """E4M3 and float32 scales."""
        return fp8(weight, self.block)
