"""GPTQ checkpoints, versions 1 and 2: the layout of AutoGPTQ, GPTQModel and this program's own packed output.

Each linear layer is ``qweight`` int32 ``[in * bits / 32, out]`` (codes packed along the inputs), ``qzeros`` int32
``[groups, out * bits / 32]``, ``scales`` ``[groups, out]`` and ``g_idx`` int32 ``[in]``, the group of each input. A
weight is ``scale * (code - zero)``. Version 1 stores every zero point minus one, modulo ``2 ** bits``. Without
``g_idx``, neighbours form groups; the last has fewer inputs if the size of the groups does not divide their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.base import Coded, Format, fits, needed, number, other_layout
from knowledge_compression.models.checkpoints.codes import unpacked
from knowledge_compression.models.streamed import Described

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Gptq(Format):
    """The GPTQ format, see the module's docstring.

    Attributes:
        zero_offset: the number subtracted from every zero point before it was stored.
        quantizer: the program that made the file, according to the file.
        sizes: sizes of groups, according to the file: that of most layers, then those of some.
    """

    zero_offset: int
    quantizer: str = ""
    sizes: Sequence[int] = ()

    name = "gptq"
    methods = ("gptq",)
    left_out = "dynamic"
    mark = ".qweight"
    endings = (".qweight", ".qzeros", ".scales", ".g_idx")
    layouts: ClassVar[Mapping[str, int]] = {"gptq": 1, "gptq_v2": 0}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Gptq:
        """The layout from ``checkpoint_format``; version 1 if it is not given."""
        layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if layout not in cls.layouts or settings.get("is_marlin_format"):
            named = "marlin" if settings.get("is_marlin_format") else layout
            raise BadInput(f"it is a GPTQ checkpoint in the layout {named}; {', '.join(cls.layouts)} can be read")
        if (words := settings.get("pack_dtype", "int32")) != "int32":
            raise BadInput(f"it is a GPTQ checkpoint packed in {words}; only int32 can be read")
        number(settings, "bits")
        meta = settings.get("meta")
        made_by = meta.get("quantizer") if isinstance(meta, Mapping) else None
        told = ", ".join(map(str, made_by)) if isinstance(made_by, list) else str(made_by or "")
        return cls(cls.layouts[layout], told, sizes_in([settings]))

    @property
    def made_by(self) -> str:
        """The value of ``meta.quantizer``."""
        return self.quantizer

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """Bits and inputs from ``qweight``, and from ``g_idx`` or ``qzeros``."""
        needed(layer, parts, ".qweight", ".qzeros", ".scales")
        rows, outputs = parts[".qweight"].matrix(f"{layer}.qweight")
        groups, columns = parts[".scales"].matrix(f"{layer}.scales")
        if columns == 8 * outputs:  # AWQ packs eight outputs in a word
            raise other_layout(layer, self.name, "awq")
        fits(layer, ".scales", parts[".scales"].shape, (groups, outputs))
        _, words = parts[".qzeros"].matrix(f"{layer}.qzeros")
        bits, inputs = _width(layer, rows, outputs, words, parts[".g_idx"].count if ".g_idx" in parts else None)
        fits(layer, ".qzeros", parts[".qzeros"].shape, (groups, outputs * bits // 32))
        size = inputs // groups if ".g_idx" in parts else self._size(layer, inputs, groups)
        return Coded((outputs, inputs), bits, min(size, inputs))

    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """``scale * (code - zero)``; every product is exact in float32."""
        words, scales = parts[".qweight"], parts[".scales"].float()
        places = parts.get(".g_idx")
        groups, outputs = scales.shape
        zeros = parts[".qzeros"]
        bits, inputs = _width(layer, len(words), outputs, zeros.shape[1], None if places is None else len(places))
        if places is None:
            places = torch.arange(inputs) // self._size(layer, inputs, groups)
        if len(places) and not (int(places.min()) >= 0 and int(places.max()) < groups):
            raise BadInput(f"{layer}.g_idx contains group {int(places.max())}, but there are only {groups} groups")
        zeros = unpacked(zeros, bits, outputs) + self.zero_offset & (1 << bits) - 1
        weight = unpacked(words.T, bits, inputs).float()
        weight -= zeros.float().T[:, places.long()]
        weight *= scales.T[:, places.long()]
        return weight

    def _size(self, layer: str, inputs: int, groups: int) -> int:
        """Inputs of a group of neighbours: the stated size that makes so many groups, otherwise equal parts."""
        found = next((size for size in self.sizes if -(-inputs // size) == groups), None)
        if found is None and inputs % groups:
            raise BadInput(f"{layer} has {groups} groups, which do not divide its {inputs} inputs")
        return found or inputs // groups


def sizes_in(settings: Iterable[Any]) -> list[int]:
    """The sizes of groups that these settings state.

    Raises:
        BadInput: one is not a whole number.
    """
    found = (number(one, "group_size") for one in settings if isinstance(one, Mapping))
    return [size for size in found if size is not None and size > 0]  # -1: one group a row


def _width(layer: str, rows: int, outputs: int, words: int, inputs: int | None) -> tuple[int, int]:
    """Bits of a code and number of inputs: from ``g_idx`` if there is one, otherwise from the words of zero points.

    Args:
        layer: its path.
        rows: rows of ``qweight``.
        outputs: its columns.
        words: columns of ``qzeros``.
        inputs: length of ``g_idx``.
    """
    if inputs is None:
        bits = 32 * words // outputs
        inputs = rows * 32 // max(1, bits)
    else:
        bits, left = divmod(rows * 32, max(1, inputs))
        if left:
            raise BadInput(
                f"{layer}.qweight has {rows} words for {inputs} inputs, which does not fit any number of bits"
            )
    if bits not in BITS:
        raise BadInput(f"{layer} has codes of {bits} bits; a GPTQ checkpoint has {', '.join(map(str, BITS))}")
    return bits, inputs
