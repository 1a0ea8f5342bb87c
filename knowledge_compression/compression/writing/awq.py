"""AWQ checkpoints (gemm), which transformers (with GPTQModel) and vLLM load; ``models/checkpoints/awq.py`` reads them.

Each quantized linear is stored, instead of its weight, as ``qweight`` int32 ``[in, out / 8]``, ``qzeros`` int32
``[groups, out / 8]`` and ``scales`` float16 ``[groups, out]``; a word holds eight outputs of 4 bits, with output
``ORDER[i]`` in the i-th lowest place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from knowledge_compression.compression.solve.coding import INTEGERS, CodedWeight, Coding
from knowledge_compression.compression.solve.grid import SCALE_BITS, QuantizedWeight
from knowledge_compression.compression.writing.layers import NEIGHBOURS, LayerWriter, same
from knowledge_compression.compression.writing.places import Place
from knowledge_compression.compression.writing.words import packed
from knowledge_compression.models.families import FINAL

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BITS, _OUTPUTS = 4, 8  # bits of a code, and outputs in a word


class AwqWriter(LayerWriter):
    """The AWQ format."""

    name = "awq"

    def unfit(self, coding: Coding, place: Place) -> str | None:
        """It holds 4-bit integers with scales of 16 bits, in groups of neighbouring inputs."""
        faults = {
            f"{self.name} holds integers, not {coding.kind}": coding.kind != INTEGERS,
            f"{self.name} holds codes of {_BITS} bits, not {coding.bits}": coding.bits != _BITS,
            f"{self.name} holds scales of {SCALE_BITS} bits; choose compression.scale_bits={SCALE_BITS}": (
                coding.scale_bits != SCALE_BITS
            ),
            NEIGHBOURS.format(self.name): not coding.in_order,
            f"{self.name} leaves the final layer as it is, and {place.path} is a target": place.role == FINAL,
            f"the {place.outputs} outputs of {place.path} do not fill whole words of {_OUTPUTS} codes": (
                place.outputs % _OUTPUTS > 0
            ),
        }
        return next((why for why, wrong in faults.items() if wrong), self.plain_linear(place))

    def tensors(self, weight: CodedWeight, floats: torch.dtype) -> Mapping[str, Tensor]:
        """Words and scales, the outputs of a word in the order of the format."""
        from knowledge_compression.models.checkpoints.awq import ORDER

        assert isinstance(weight, QuantizedWeight)
        grid = weight.grid

        def words(codes: Tensor) -> Tensor:
            turned = codes.unflatten(1, (-1, _OUTPUTS))[..., list(ORDER)].flatten(1)
            return packed(turned.T, _BITS).T.contiguous()

        return {
            ".qweight": words(weight.codes.T),
            ".qzeros": words(grid.zeros.T),
            ".scales": grid.scales.T.half().contiguous(),
        }

    def settings(self, coded: Mapping[Place, Coding], left: Mapping[str, str | None]) -> dict[str, Any]:
        """The settings as AutoAWQ writes them; layers that are not quantized are listed."""
        return {
            "quant_method": "awq",
            "bits": _BITS,
            "group_size": same("group size", [coding.group or -1 for coding in coded.values()]),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(left) or None,
        }
