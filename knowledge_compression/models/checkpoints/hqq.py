"""HQQ checkpoints: the layers of hqq 0.2 in safetensors, as transformers 4 saves them.

The weight ``shape``, ``[out, in]``, is a table ``[-1, group_size]`` whose rows are the groups (``axis`` 1), or a table
``[group_size, -1]`` whose columns are the groups (``axis`` 0); without ``channel_wise`` it is the weight itself, as one
group. ``scale`` and ``zero`` hold one number a group, or ``zero_scale`` holds both. A weight is
``(code - zero) * scale``; the zero points are real numbers.

``W_q`` is the table of codes ``[ceil(rows / n), columns]``: ``n`` codes lie in a byte, or ten of 3 bits in an int32,
and the first part of the rows lies in the highest bits. ``view_as_float`` says that these bytes are declared as floats.
All settings are tensors of one number or of letters; those of letters are not read. hqq multiplies in the type in which
a model is loaded; here products are rounded to float32 alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.base import Coded, Format, needed
from knowledge_compression.models.streamed import Described

# Bits of a stored code, and the number of codes in a byte or word.
PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (4, 2), "3bit_32": (3, 10), "2bit_u8": (2, 4), "1bit_u8": (1, 8)}
_NEEDED = (".shape", ".nbits", ".group_size", ".axis", ".packing")
_SETTINGS = (*_NEEDED, ".channel_wise", ".view_as_float")
_UNREAD = (
    *(".compute_dtype", ".unpack_view_dtype", ".encoded_state_dict", ".stores_quant_config", ".offload_meta"),
    *(".optimize", ".round_zero", ".quant_scale", ".quant_zero"),
)


@dataclass(frozen=True)
class Table:
    """How one layer's codes lie in its table.

    Attributes:
        shape: outputs and inputs.
        rows, columns: of the table.
        axis: along which a group lies; None if all is one group.
        bits: of a code.
        group: number of weights in a group.
        packing: one of :data:`PACKINGS`.
        as_floats: whether the bytes of the codes are declared as floats.
    """

    shape: tuple[int, int]
    rows: int
    columns: int
    axis: int | None
    bits: float
    group: int
    packing: str
    as_floats: bool

    @classmethod
    def of(cls, layer: str, told: Mapping[str, Tensor]) -> Table:
        """From a layer's settings.

        Raises:
            BadInput: one is missing, or no table fits them.
        """
        needed(layer, told, *_NEEDED)
        shape = told[".shape"].flatten().tolist()
        if len(shape) != 2 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise BadInput(f"{layer}.shape is {shape}, which must be two sizes")
        outputs, inputs = shape
        packing = bytes(told[".packing"].flatten().to(torch.uint8).tolist()).decode("ascii", "replace")
        if packing not in PACKINGS:
            raise BadInput(f"{layer} is packed as {packing!r}; {', '.join(PACKINGS)} can be read")
        bits, group, axis = (_number(layer, told, name) for name in (".nbits", ".group_size", ".axis"))
        floats, channels = (
            _number(layer, told, name, use) for name, use in ((".view_as_float", 0), (".channel_wise", 1))
        )
        told_bits = round(bits, 2) if bits % 1 else int(bits)
        if not channels:
            return cls((outputs, inputs), outputs, inputs, None, told_bits, outputs * inputs, packing, bool(floats))
        if axis not in (0, 1) or group < 1 or group % 1 or outputs * inputs % group:
            raise BadInput(
                f"{layer} has axis={axis:g} and group_size={group:g}; the axis must be 0 or 1, and the size must "
                f"divide its {outputs * inputs} weights"
            )
        sizes = (int(group), outputs * inputs // int(group))
        rows, columns = sizes if axis == 0 else sizes[::-1]
        return cls((outputs, inputs), rows, columns, int(axis), told_bits, int(group), packing, bool(floats))

    @property
    def groups(self) -> tuple[int, int]:
        """The scales as a table: one a column, one a row, or one."""
        return (1 if self.axis != 1 else self.rows, 1 if self.axis != 0 else self.columns)

    def check(self, layer: str, words: Described) -> None:
        """Refuse codes that do not fill the table.

        Raises:
            BadInput: their shape or type is another one.
        """
        width = 4 if self.packing == "3bit_32" else 1
        rows = -(-self.rows // PACKINGS[self.packing][1])
        typed = words.floats if self.as_floats else words.dtype == ("I32" if width == 4 else "U8")
        if not typed or len(words.shape) != 2 or words.shape[0] != rows or words.bytes != rows * self.columns * width:
            raise BadInput(
                f"{layer}.W_q is {words.dtype} {list(words.shape)}, which does not hold {self.rows} x {self.columns} "
                f"codes in the packing {self.packing}"
            )

    def codes(self, words: Tensor) -> Tensor:
        """The table of codes, float32 ``[rows, columns]``."""
        bits, count = PACKINGS[self.packing]
        words = words.view(torch.int32 if self.packing == "3bit_32" else torch.uint8)
        parts = [words >> bits * place & (1 << bits) - 1 for place in reversed(range(count))]
        return torch.cat(parts)[: self.rows].float()


@dataclass(frozen=True)
class Hqq(Format):
    """HQQ's format, see the module's docstring."""

    name = "hqq"
    methods = ("hqq",)
    left_out = "skip_modules"
    mark = ".W_q"
    endings = (".W_q", ".scale", ".zero", ".zero_scale", *_SETTINGS, *_UNREAD)
    telling = _SETTINGS

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Hqq:
        """Every layer states its own settings."""
        return cls()

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """The shape that the layer states; the codes and scales must have the sizes that follow from it."""
        table = Table.of(layer, {".W_q": None} | dict(told))  # type: ignore[arg-type]
        table.check(layer, parts[".W_q"])
        together = ".zero_scale" in parts
        if not together:
            needed(layer, parts, ".scale", ".zero")
        groups = table.groups[0] * table.groups[1]
        for ending, count in (
            {".zero_scale": 2 * groups}.items() if together else ((".scale", groups), (".zero", groups))
        ):
            if parts[ending].count != count or not parts[ending].floats:
                there = parts[ending]
                raise BadInput(f"{layer}{ending} is {there.dtype} {list(there.shape)}, which must be {count} floats")
        return Coded(table.shape, table.bits, table.group)

    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """``(code - zero) * scale``; the difference and the product are each rounded once."""
        table = Table.of(layer, parts)
        zero, scale = parts[".zero_scale"] if ".zero_scale" in parts else (parts[".zero"], parts[".scale"])
        weight = table.codes(parts[".W_q"])
        weight -= zero.float().reshape(table.groups)
        weight *= scale.float().reshape(table.groups)
        return weight.reshape(table.shape)


def _number(layer: str, told: Mapping[str, Tensor], ending: str, default: float | None = None) -> float:
    """A setting of one number.

    Raises:
        BadInput: it is no single number.
    """
    if default is not None and ending not in told:
        return default
    if told[ending].numel() != 1:
        raise BadInput(f"{layer}{ending} has the shape {list(told[ending].shape)}, which must be one number")
    return float(told[ending])
