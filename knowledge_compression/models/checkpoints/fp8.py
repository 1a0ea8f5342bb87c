"""Block FP8, as DeepSeek-V3 introduced it: 8-bit floats (E4M3) with one float32 scale for each block of 128 x 128.

Each linear layer is ``weight`` float8_e4m3fn ``[out, in]`` and ``weight_scale_inv`` ``[out / 128, in / 128]``, rounded
up; a weight is ``value * scale_inv``, rounded once. The size of the blocks is ``weight_block_size``; without one,
there is one scale for the whole weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.base import Coded, Format, fits, needed
from knowledge_compression.models.checkpoints.codes import powers_of_two, spread
from knowledge_compression.models.streamed import Described

FLOAT8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class BlockFp8(Format):
    """The block FP8 format, see the module's docstring.

    Attributes:
        block: outputs and inputs of a block; None for one scale per weight matrix.
        activations: how activations are rounded at run time.
    """

    block: tuple[int, int] | None
    activations: str = "dynamic"

    name = "fp8"
    methods = ("fp8",)
    mark = ".weight_scale_inv"
    endings = (".weight", ".weight_scale_inv")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> BlockFp8:
        """The block size from ``weight_block_size``."""
        block = settings.get("weight_block_size", (128, 128))
        if block is not None:
            whole = isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
            if not whole:
                raise BadInput(f"its quantization_config has weight_block_size={block!r}, which must be two sizes")
            block = (block[0], block[1])
        return cls(block, str(settings.get("activation_scheme", "dynamic")))

    @property
    def notes(self) -> tuple[str, ...]:
        """A remark that activations are not rounded here."""
        return (f"it is meant to be used with 8-bit activations ({self.activations}), which is not done here",)

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """One scale per block."""
        needed(layer, parts, ".weight")
        shape, scales = parts[".weight"].matrix(f"{layer}.weight"), parts[".weight_scale_inv"].shape
        if parts[".weight"].dtype not in FLOAT8:
            raise BadInput(f"{layer}.weight is {parts['.weight'].dtype} beside a scale; FP8 has {' or '.join(FLOAT8)}")
        if self.block is None:
            if parts[".weight_scale_inv"].count != 1:
                raise BadInput(
                    f"{layer}.weight_scale_inv has the shape {list(scales)}; without blocks it must be one number"
                )
            return Coded(shape, 8, shape[0] * shape[1])
        fits(layer, ".weight_scale_inv", scales, [-(-n // b) for n, b in zip(shape, self.block, strict=True)])
        return Coded(shape, 8, self.block[0] * self.block[1])

    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """``value * scale_inv``."""
        weight, scales = parts[".weight"].float(), parts[".weight_scale_inv"]
        scales = powers_of_two(scales) if scales.dtype == torch.uint8 else scales.float()
        if self.block is None:
            return weight * scales.reshape(())
        return weight.mul_(spread(scales, tuple(weight.shape), self.block))
