"""Integer grids for weights: how a row, or a group of its columns, is rounded to a few bits.

A weight ``w`` becomes the code ``q = clamp(round(w / s) + z, 0, 2^bits - 1)`` and reads back as ``s (q - z)``, with a
scale ``s`` and a whole-numbered zero point ``z`` for each output row and group of input columns. Zero is on every grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knowledge_compression.compression.report import LayerReport
from knowledge_compression.errors import BadInput
from knowledge_compression.models.targets import TargetLayer

SCALE_BITS = 16  # scales are stored as float16, as packed checkpoints hold them


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as integers, whence a packed checkpoint is written; everything on the CPU.

    Attributes:
        codes: uint8 ``[out_features, in_features]``, columns in the layer's own order.
        scales: float32 ``[out_features, groups]``, every value exact in float16.
        zeros: uint8 ``[out_features, groups]``.
        group_of: int32 ``[in_features]``, the group of each input column (``g_idx`` of packed checkpoints).
        bits: width of a code.
        symmetric: whether every zero point is ``2^(bits - 1)``.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor
    bits: int
    symmetric: bool

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, float32 ``[out_features, in_features]``."""
        return dequantized(self.codes, self.scales[:, self.group_of], self.zeros[:, self.group_of])

    def put_into(self, module: nn.Module, weight: Tensor) -> None:
        """Write the weight these codes stand for into ``weight`` (the module's own) and keep the codes beside it."""
        weight.copy_(self.dequantize())
        module.__dict__["quantized_weight"] = self  # an ordinary attribute: neither a parameter nor in the state dict

    @property
    def overhead_bits(self) -> int:
        """Bits for scales and, where they vary, zero points."""
        return self.scales.numel() * (SCALE_BITS + (0 if self.symmetric else self.bits))


def quantized_weight(layer: TargetLayer) -> QuantizedWeight | None:
    """The integers behind a layer's weight; None where it has none, or its weight was changed since."""
    kept = getattr(layer.module, "quantized_weight", None)
    if kept is None or not torch.equal(kept.dequantize().to(layer.weight), layer.weight):
        return None
    return kept


def dequantized(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """``s (q - z)`` in the scales' type; shapes broadcast."""
    return scales * (codes.to(scales.dtype) - zeros.to(scales.dtype))


@dataclass(frozen=True)
class Grid:
    """The choice of a grid; methods hold one and fit it to the weights.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: input columns that share a scale; None takes the whole row (per channel).
        symmetric: whether the zero point is fixed at the middle of the range.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        """Refuse widths that no packed format holds."""
        if self.bits not in (2, 3, 4, 8):
            raise BadInput(f"compression.bits={self.bits} is not offered; choose 2, 3, 4 or 8")
        if self.group_size is not None and self.group_size < 1:
            raise BadInput(
                f"compression.group_size={self.group_size} is not a number of columns; choose 32, 64, 128 or null"
            )

    @property
    def top(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    def check(self, layers: Sequence[TargetLayer]) -> None:
        """Refuse a group size that does not divide the input width of every layer."""
        for layer in layers:
            width = layer.weight.shape[1]
            if self.group_size is not None and width % self.group_size:
                raise BadInput(
                    f"compression.group_size={self.group_size} does not divide the {width} inputs of {layer.path}; "
                    "choose a divisor, or null for one scale per row"
                )

    def width(self, in_features: int) -> int:
        """Columns of one group for a layer with this many inputs."""
        return self.group_size or in_features

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points ``[..., 1]`` that span the values of ``weight`` along its last dimension."""
        low, high = weight.amin(-1, keepdim=True).clamp(max=0), weight.amax(-1, keepdim=True).clamp(min=0)
        return self._spanning(low, high)

    def encode(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Codes of the nearest grid points, in the weight's own type; shapes broadcast."""
        return torch.clamp(torch.round(weight / scales) + zeros, 0, self.top)

    def round(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest grid points themselves; shapes broadcast."""
        return dequantized(self.encode(weight, scales, zeros), scales, zeros)

    def _spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales = storable((high - low) / self.top)
        zeros = torch.full_like(scales, 2 ** (self.bits - 1)) if self.symmetric else torch.round(-low / scales)
        return scales, zeros.clamp(0, self.top)


def storable(scales: Tensor) -> Tensor:
    """The nearest scales that float16 holds; a row of zeros gets 1."""
    return torch.where(scales > 0, scales.half().to(scales).clamp(min=2.0**-24, max=65504.0), torch.ones_like(scales))


def quantized_report(layer: TargetLayer, weight: QuantizedWeight) -> LayerReport:
    """The part of a layer's report that follows from its codes."""
    return LayerReport(
        layer.path, layer.role, layer.parameters, bits=float(weight.bits), overhead_bits=weight.overhead_bits
    )
