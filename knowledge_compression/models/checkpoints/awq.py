"""AWQ checkpoints in the gemm layout of AutoAWQ.

Each linear layer is ``qweight`` int32 ``[in, out / 8]``, ``qzeros`` int32 ``[groups, out / 8]`` and ``scales``
``[groups, out]``; a word holds eight outputs of 4 bits, with output ``ORDER[i]`` in the i-th lowest place. A weight is
``scale * (code - zero)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.base import Coded, Format, fits, needed, number, other_layout
from knowledge_compression.models.checkpoints.codes import unpacked
from knowledge_compression.models.streamed import Described

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BITS = 4


@dataclass(frozen=True)
class Awq(Format):
    """The AWQ format, see the module's docstring.

    Attributes:
        quantizer: the program that made the file, if it is known.
    """

    quantizer: str = ""

    name = "awq"
    methods = ("awq",)
    mark = ".qweight"
    endings = (".qweight", ".qzeros", ".scales")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Awq:
        """The gemm layout, which has a single width."""
        layout = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if layout != "gemm":
            raise BadInput(f"it is an AWQ checkpoint in the layout {layout}; only gemm can be read")
        bits = number(settings, "bits", number(settings, "w_bit", BITS))
        if bits != BITS:
            raise BadInput(f"it is an AWQ checkpoint of {bits} bits; the gemm layout has {BITS}")
        return cls()

    @property
    def made_by(self) -> str:
        """Empty, but where :attr:`quantizer` is known."""
        return self.quantizer

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """Inputs and outputs from ``qweight``, groups from ``scales``."""
        needed(layer, parts, *self.endings)
        inputs, words = parts[".qweight"].matrix(f"{layer}.qweight")
        groups, columns = parts[".scales"].matrix(f"{layer}.scales")
        if columns == words:  # GPTQ packs inputs, not outputs
            raise other_layout(layer, self.name, "gptq")
        fits(layer, ".scales", parts[".scales"].shape, (groups, 8 * words))
        fits(layer, ".qzeros", parts[".qzeros"].shape, (groups, words))
        if groups == 0 or inputs % groups:
            raise BadInput(f"{layer} has {groups} groups, which do not divide its {inputs} inputs")
        return Coded((8 * words, inputs), BITS, inputs // groups)

    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """``scale * (code - zero)``; every product is exact in float32."""
        scales = parts[".scales"].float()
        weight, zeros = (_in_order(parts[ending]).float() for ending in (".qweight", ".qzeros"))
        run = len(weight) // len(scales)
        weight -= zeros.repeat_interleave(run, 0)
        weight *= scales.repeat_interleave(run, 0)
        return weight.T.contiguous()


def _in_order(words: Tensor) -> Tensor:
    """Codes ``[rows, 8 * words]`` in the order of the outputs."""
    codes = unpacked(words, BITS, 8 * words.shape[1]).unflatten(1, (-1, 8))
    ordered = torch.empty_like(codes)
    ordered[..., list(ORDER)] = codes
    return ordered.flatten(1)
