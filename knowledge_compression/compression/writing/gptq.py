"""GPTQ checkpoints, which transformers (with GPTQModel) loads; ``models/checkpoints/gptq.py`` reads them.

vLLM 0.32 loads those of version 1 with 4 or 8 bits and groups of neighbouring inputs.

Each quantized linear ``<path>`` is stored, instead of its weight, as

- ``qweight``, int32 ``[in_features * bits / 32, out_features]``: the codes, packed along the inputs;
- ``qzeros``, int32 ``[groups, out_features * bits / 32]``: the zero points, packed along the outputs;
- ``scales``, float16 ``[groups, out_features]``;
- ``g_idx``, int32 ``[in_features]``: the group of each input.

Packed codes are one stream of bits, the first code in the lowest bits of the first word; a 3-bit code may lie in two
words. ``checkpoint_format=gptq`` stores every zero point minus one, so that a zero point of 0 does not fit; asymmetric
grids are therefore written as ``gptq_v2``, which stores zero points unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from knowledge_compression.compression.solve.coding import INTEGERS, CodedWeight, Coding
from knowledge_compression.compression.solve.grid import SCALE_BITS, QuantizedWeight
from knowledge_compression.compression.writing.layers import LayerWriter, half_filled, same
from knowledge_compression.compression.writing.places import Place
from knowledge_compression.compression.writing.words import packed
from knowledge_compression.models.families import FINAL, TRANSFORM

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class GptqWriter(LayerWriter):
    """The GPTQ format: version 1 for symmetric grids, version 2 for others."""

    name = "gptq"
    beside = "quantize_config.json"

    def unfit(self, coding: Coding, place: Place) -> str | None:
        """It holds integers with scales of 16 bits, in whole words."""
        if coding.kind != INTEGERS:
            return f"{self.name} holds integers, not {coding.kind}"
        if coding.scale_bits != SCALE_BITS:
            return f"{self.name} holds scales of {SCALE_BITS} bits; choose compression.scale_bits={SCALE_BITS}"
        return half_filled(coding.bits, place)

    def tensors(self, weight: CodedWeight, floats: torch.dtype) -> Mapping[str, Tensor]:
        """Words, scales and the group of each input."""
        assert isinstance(weight, QuantizedWeight)
        grid = weight.grid
        zeros = grid.zeros - 1 if grid.symmetric else grid.zeros
        return {
            ".qweight": packed(weight.codes.T, grid.bits),
            ".qzeros": packed(zeros, grid.bits).T.contiguous(),
            ".scales": grid.scales.T.half().contiguous(),
            ".g_idx": grid.group_of.clone(),
        }

    def settings(self, coded: Mapping[Place, Coding], left: Mapping[str, str | None]) -> dict[str, Any]:
        """The settings as GPTQModel writes them; linear layers of the blocks that are not quantized are listed."""
        codings = list(coded.values())
        symmetric = same("kind of grid", [coding.symmetric for coding in codings])
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": same("number of bits", [coding.bits for coding in codings]),
            "group_size": same("group size", [coding.group or -1 for coding in codings]),
            "sym": symmetric,
            "desc_act": not all(coding.in_order for coding in codings),
            "lm_head": any(place.role == FINAL for place in coded),
            "pack_dtype": "int32",
            "checkpoint_format": "gptq" if symmetric else "gptq_v2",
            "meta": {"quantizer": ["knowledge_compression"]},
        }
        if skipped := [path for path, role in left.items() if role not in (FINAL, TRANSFORM, None)]:
            config["dynamic"] = {f"-:^{path}$".replace(".", r"\."): {} for path in skipped}
        return config
