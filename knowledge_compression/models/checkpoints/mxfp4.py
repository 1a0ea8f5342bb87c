"""MXFP4 as gpt-oss stores its experts: 4-bit floats in blocks of 32 that share a power of two.

Each bank of experts is ``<name>_blocks`` uint8 ``[experts, out, in / 32, 16]``, two values a byte, the low half first,
and ``<name>_scales`` uint8 ``[experts, out, in / 32]`` (OCP Microscaling Formats, v1.0). The network's parameter is
``[experts, in, out]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.base import Coded, Format, fits, needed
from knowledge_compression.models.checkpoints.codes import fp4, powers_of_two
from knowledge_compression.models.streamed import Described


@dataclass(frozen=True)
class Mxfp4(Format):
    """The MXFP4 format of gpt-oss, see the module's docstring."""

    name = "mxfp4"
    methods = ("mxfp4",)
    mark = "_blocks"
    endings = ("_blocks", "_scales")
    weight = ""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Mxfp4:
        """There is only one layout."""
        return cls()

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """Blocks of 16 bytes."""
        needed(layer, parts, *self.endings)
        blocks = parts["_blocks"].shape
        if len(blocks) != 4 or blocks[3] != 16:
            raise BadInput(f"{layer}_blocks has the shape {list(blocks)}; MXFP4 has [experts, out, in / 32, 16]")
        fits(layer, "_scales", parts["_scales"].shape, blocks[:3])
        return Coded((blocks[0], 32 * blocks[2], blocks[1]), 4, 32)

    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Each value times its block's power of two, exactly."""
        weight = fp4(parts["_blocks"])
        weight *= powers_of_two(parts["_scales"])[..., None]
        return weight.flatten(-2).transpose(1, 2).contiguous()
