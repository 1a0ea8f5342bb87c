"""FP8: weights as 8-bit floats (E4M3) with shared scales (Micikevicius et al. 2022); needs no text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from knowledge_compression.building import Positive
from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.coding import FP8, Coding
from knowledge_compression.compression.solve.floats import Block, coding_of, fp8
from knowledge_compression.models import TargetLayer


@dataclass(frozen=True)
class Fp8(Layerwise):
    """Divide each block of weights by a float32 scale so that its largest magnitude is 448, and round to E4M3.

    Attributes:
        granularity: ``channel`` (a scale per output), ``tensor`` (one per weight), or ``block`` (one per square, as in
            DeepSeek-V3).
        block_size: outputs and inputs of a square.
    """

    granularity: Literal["channel", "tensor", "block"] = "channel"
    block_size: Positive = 128
    name = "fp8"

    @property
    def block(self) -> Block:
        """Outputs and inputs that share a scale."""
        blocks: dict[str, Block] = {"channel": (1, None), "tensor": (None, None)}
        return blocks.get(self.granularity, (self.block_size, self.block_size))

    @property
    def coding(self) -> Coding:
        """E4M3 and float32 scales."""
        return coding_of(FP8, self.block)

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Round the layer in place."""
        rounded = fp8(layer.weight, self.block)
        rounded.put_into(layer)
        return rounded.report(layer)
