"""Checkpoints of bitsandbytes (NF4), which transformers loads; ``models/checkpoints/bitsandbytes.py`` reads them.

A layer's ``weight`` is uint8 ``[out * in / 2, 1]``, two codes a byte, the first in the high half. Beside it are
``weight.absmax``, float32, one scale for each run of weights; ``weight.quant_map``, float32 ``[16]``, the levels; and
``weight.quant_state.bitsandbytes__nf4``, JSON as bytes, which describes the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from knowledge_compression.compression.solve.coding import NF4, CodedWeight, Coding
from knowledge_compression.compression.solve.nf4 import Nf4Weight, levels
from knowledge_compression.compression.writing.layers import LayerWriter
from knowledge_compression.compression.writing.places import Place
from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

_RUNS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # the lengths that the library supports


class BitsandbytesWriter(LayerWriter):
    """The bitsandbytes format, 4 bits."""

    name = "bitsandbytes"

    def unfit(self, coding: Coding, place: Place) -> str | None:
        """It holds NF4 in runs of weights, two codes a byte."""
        if coding.kind != NF4:
            return f"{self.name} holds NF4, not {coding.kind}"
        assert coding.run is not None
        if coding.run not in _RUNS:
            return f"{self.name} takes blocks of {', '.join(map(str, _RUNS))} weights, not {coding.run}"
        if place.outputs * place.inputs % 2:
            return f"the {place.outputs} x {place.inputs} weights of {place.path} do not fill whole bytes"
        if place.start * place.inputs % coding.run:
            return f"blocks of {coding.run} weights do not end where files divide the outputs at {place.path}"
        return self.plain_linear(place)

    def tensors(self, weight: CodedWeight, floats: torch.dtype) -> Mapping[str, Tensor]:
        """Codes, scales, levels and their description."""
        assert isinstance(weight, Nf4Weight)
        first, second = weight.codes.flatten().unflatten(0, (-1, 2)).unbind(1)
        said = {"quant_type": "nf4", "blocksize": weight.block_size, "shape": list(weight.codes.shape)}
        state = json.dumps(said | {"dtype": str(floats).removeprefix("torch.")})
        return {
            ".weight": (first << 4 | second)[:, None],
            ".weight.absmax": weight.scales,
            ".weight.quant_map": levels(),
            ".weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
        }

    def settings(self, coded: Mapping[Place, Coding], left: Mapping[str, str | None]) -> dict[str, Any]:
        """The settings as transformers writes them; products are in float32, as here, by default."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(left),
        }
