"""NF4, the 4-bit grid of QLoRA whose levels are quantiles of the normal distribution (Dettmers et al. 2023, section 3).

Written here because the one library that has it stores packed bytes in ``.weight``: code that reads this attribute
(T5's does) then fails, and the weights cannot be saved as plain floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.coding import Coding
from knowledge_compression.compression.solve.nf4 import SCALE_BITS, Nf4Weight, levels, nf4, nf4_coding
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor

_DOUBLE_BLOCK = 256


@dataclass(frozen=True)
class Nf4(Layerwise):
    """Round each block of weights to sixteen levels times the block's largest magnitude; needs no text.

    Attributes:
        block_size: number of neighbouring weights that share a scale; blocks continue across rows, as published.
        double_quant: store the scales, minus their mean, in 8 bits with one float per 256 of them (section 3, "Double
            Quantization"; here with evenly spaced integers, in the published code with a dynamic 8-bit type).
    """

    block_size: int = 64
    double_quant: bool = False
    name = "nf4"

    def __post_init__(self) -> None:
        """Refuse empty blocks."""
        if self.block_size < 1:
            raise BadInput(f"compression.block_size={self.block_size} is not a number of weights; choose e.g. 64")

    @property
    def coding(self) -> Coding | None:
        """NF4; None if its scales are rounded again."""
        return None if self.double_quant else nf4_coding(self.block_size)

    @property
    def for_codes(self) -> str:
        """What leaves codes."""
        return "compression.double_quant=false"

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Round the layer's weights in place."""
        weight = layer.weight
        if not self.double_quant:
            codes, scales = nf4(weight, self.block_size)
            codes = codes.flatten()[: weight.numel()].view(weight.shape)
            coded = Nf4Weight(codes.to("cpu", torch.uint8), scales.flatten().cpu(), self.block_size)
            coded.put_into(layer)
            return coded.report(layer)
        weight.copy_(self.rounded(weight))
        blocks = -(-weight.numel() // self.block_size)
        return LayerReport.of(layer, bits=4.0, overhead_bits=self._scale_bits(blocks))

    def rounded(self, weight: Tensor) -> Tensor:
        """The nearest values that NF4 can store, in the weight's shape, computed in float32."""
        codes, scales = nf4(weight, self.block_size)
        if self.double_quant:
            scales = _in_eight_bits(scales)
        return (levels().to(weight.device)[codes] * scales).flatten()[: weight.numel()].view(weight.shape)

    def _scale_bits(self, blocks: int) -> int:
        if not self.double_quant:
            return blocks * SCALE_BITS
        return blocks * 8 + -(-blocks // _DOUBLE_BLOCK) * SCALE_BITS + SCALE_BITS


def _in_eight_bits(scales: Tensor) -> Tensor:
    """Scales ``[blocks, 1]`` minus their mean, rounded to 255 even steps in runs of 256, never below zero."""
    mean = scales.mean()
    runs = torch.nn.functional.pad((scales - mean).flatten(), (0, -len(scales) % _DOUBLE_BLOCK)).view(-1, _DOUBLE_BLOCK)
    step = runs.abs().amax(1, keepdim=True) / 127
    rounded = torch.round(runs / torch.where(step > 0, step, 1.0)) * step
    return (rounded.flatten()[: len(scales), None] + mean).clamp(min=0)
