"""NF4: sixteen levels at quantiles of the normal distribution, times the largest magnitude of a block of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.coding import NF4, CodedWeight, Coding
from knowledge_compression.heavy import functional, torch
from knowledge_compression.models.targets import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor

SCALE_BITS = 32


@dataclass(frozen=True, eq=False)
class Nf4Weight(CodedWeight):
    """A weight as NF4, on the CPU.

    Attributes:
        codes: uint8 ``[out_features, in_features]``, indices into :func:`levels`.
        scales: float32 ``[blocks]``.
        block_size: number of neighbouring weights that share a scale; blocks continue across rows.
    """

    codes: Tensor
    scales: Tensor
    block_size: int

    @property
    def coding(self) -> Coding:
        """The meaning of the codes."""
        return nf4_coding(self.block_size)

    def dequantize(self) -> Tensor:
        """Each level times the scale of its block, float32 ``[out_features, in_features]``."""
        each = self.scales.repeat_interleave(self.block_size)[: self.codes.numel()]
        return levels()[self.codes.int()] * each.view(self.codes.shape)

    def rows(self, start: int, end: int) -> Nf4Weight:
        """The part of some output rows; if blocks do not end there, only the whole weight."""
        width = self.codes.shape[1]
        first, last = start * width, end * width
        if first % self.block_size or (last % self.block_size and end < len(self.codes)):
            raise ValueError(f"rows {start} to {end} of {width} do not fill whole blocks of {self.block_size}")
        scales = self.scales[first // self.block_size : -(-last // self.block_size)]
        return Nf4Weight(self.codes[start:end], scales, self.block_size)

    def put_into(self, layer: TargetLayer) -> None:
        """Write the weight into the layer, and store these codes with its module."""
        layer.weight.copy_(self.dequantize())
        layer.notes["quantized_weight"] = self

    def report(self, layer: TargetLayer) -> LayerReport:
        """Bits of the codes, and of the scales."""
        return LayerReport.of(layer, bits=4.0, overhead_bits=SCALE_BITS * self.scales.numel())

    def taken_apart(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Codes and scales."""
        return {"codes": self.codes, "scales": self.scales}, {"block_size": self.block_size}

    @classmethod
    def put_together(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Nf4Weight:
        """The inverse of :meth:`taken_apart`."""
        return cls(tensors["codes"], tensors["scales"], settings["block_size"])


def nf4_coding(block_size: int) -> Coding:
    """The meaning of such codes: blocks are runs of weights, across rows."""
    return Coding(NF4, 4, (1, None), scale_bits=SCALE_BITS, run=block_size)


def nf4(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Round a weight of any floating dtype, in float32 on its device.

    Returns:
        Codes, int64 ``[blocks, block_size]``, the last block filled with zeros; and scales, float32 ``[blocks, 1]``.
    """
    blocks = functional.pad(weight.float().flatten(), (0, -weight.numel() % block_size)).view(-1, block_size)
    scales = blocks.abs().amax(1, keepdim=True)
    grid = levels().to(weight.device)
    return torch.bucketize(blocks / torch.where(scales > 0, scales, 1.0), (grid[1:] + grid[:-1]) / 2), scales


@cache
def levels() -> Tensor:
    """The sixteen levels, float32, rising from -1 to 1 with an exact zero (appendix E).

    Eight quantiles of the standard normal on the negative side and nine on the positive side, both counting the zero,
    evenly spaced in probability from the mean of 1 - 1/32 and 1 - 1/30 to 1/2, and divided by the largest. That mean
    has seven digits, and probabilities, quantiles and quotients are rounded to float32, as in the published code, whose
    levels these are bit by bit.
    """
    outermost = 0.9677083
    up, down = (
        torch.special.ndtri(torch.linspace(outermost, 0.5, count, dtype=torch.float32).double()).float()
        for count in (9, 8)
    )
    return torch.cat([-down[:-1], up.flip(0)]) / up[0]
