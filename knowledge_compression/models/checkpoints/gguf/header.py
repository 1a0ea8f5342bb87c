"""The header of a GGUF file: its settings, and the place and type of each tensor.

The layout is that of the GGUF specification of ggml, versions 2 and 3, little-endian. Every length is checked against
the size of the file before it is used.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from knowledge_compression.errors import BadInput

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_LARGEST_NAME = 1 << 16  # bytes of a key or a tensor's name
_MOST_DIMENSIONS = 4
_SIMPLE = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: its name in the file, e.g. ``blk.0.attn_q.weight``.
        shape: shape of its values, the slowest axis first.
        kind: how they are stored.
        start: offset of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int

    @property
    def parameters(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.parameters // block * size

    def read(self, path: Path) -> NDArray[np.uint8]:
        """Its bytes, ``[..., bytes of a row]``, backed by the file."""
        data = np.memmap(path, dtype=np.uint8, mode="r", offset=self.start, shape=(self.bytes,))
        return np.asarray(data).reshape(*self.shape[:-1], -1)


@dataclass(frozen=True)
class GgufHeader:
    """The header of one file.

    Attributes:
        path: the file.
        settings: every value; for a list of texts, only its length.
        kinds: the type of each value; for a list, the type of its entries.
        tensors: in the order of the file.
    """

    path: Path
    settings: Mapping[str, Any]
    kinds: Mapping[str, GGUFValueType]
    tensors: Sequence[GgufTensor]

    @classmethod
    def of(cls, path: Path) -> GgufHeader:
        """Read it.

        Raises:
            BadInput: the file is not a GGUF file of these versions, is truncated, or contains an unknown type of value.
        """
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return cls._parsed(path, _Cursor(content))

    @classmethod
    def _parsed(cls, path: Path, cursor: _Cursor) -> GgufHeader:
        if cursor.take(4) != MAGIC:
            raise BadInput("it does not begin with GGUF's magic bytes")
        version, count, values = cursor.unpack("IQQ")
        if version not in VERSIONS:
            raise BadInput(
                f"it is a GGUF file of version {version}; versions {' and '.join(map(str, VERSIONS))} can be read"
            )
        settings: dict[str, Any] = {}
        kinds: dict[str, GGUFValueType] = {}
        for _ in range(values):
            key = cursor.text(_LARGEST_NAME)
            kinds[key], settings[key] = cursor.value()
        described = [cursor.tensor() for _ in range(count)]
        step = settings.get("general.alignment", 32)
        if not isinstance(step, int) or step < 1 or step & (step - 1):
            raise BadInput(f"its general.alignment is {step!r}, which is not a power of two")
        begin = -(-cursor.at // step) * step
        tensors = [GgufTensor(name, shape, kind, begin + offset) for name, shape, kind, offset in described]
        for tensor in tensors:
            if tensor.start + tensor.bytes > cursor.size:
                raise BadInput(
                    f"it is truncated: {tensor.name} ends at byte {tensor.start + tensor.bytes:,}, but the file has "
                    f"only {cursor.size:,}"
                )
        return cls(path, settings, kinds, tensors)


class _Cursor:
    """A reading position in a file."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at, self.size = content, 0, len(content)

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise BadInput(f"it is truncated: {count:,} bytes are needed at byte {self.at:,} of {self.size:,}")
        self.at += count
        return self.content[self.at - count : self.at]

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def text(self, longest: int) -> str:
        (length,) = self.unpack("Q")
        if length > longest:
            raise BadInput(f"it is damaged: a name of {length:,} bytes at byte {self.at:,}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise BadInput(f"it is damaged: {error}") from None

    def value(self) -> tuple[GGUFValueType, Any]:
        kind = self.kind()
        if kind in _SIMPLE:
            return kind, self.unpack(_SIMPLE[kind])[0]
        if kind == GGUFValueType.STRING:
            return kind, self.text(self.size)
        inside, (count,) = self.kind(), self.unpack("Q")
        if inside in _SIMPLE:
            form = _SIMPLE[inside]
            return inside, list(struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize(f"<{form}"))))
        if inside != GGUFValueType.STRING:
            raise BadInput("it holds lists of lists, which GGUF files of models do not")
        for _ in range(count):  # each takes at least eight bytes, so that a wrong count soon reaches the end
            self.take(self.unpack("Q")[0])
        return inside, count

    def kind(self) -> GGUFValueType:
        (number,) = self.unpack("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise BadInput(f"it is damaged: a value of the unknown type {number} at byte {self.at:,}") from None

    def tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self.text(_LARGEST_NAME)
        (count,) = self.unpack("I")
        if not 1 <= count <= _MOST_DIMENSIONS:
            raise BadInput(f"it is damaged: {name} has {count} dimensions")
        *sizes, number, offset = self.unpack(f"{count}QIQ")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise BadInput(f"{name} is stored in the type {number}, which the installed gguf does not know") from None
        block, _ = GGML_QUANT_SIZES[kind]
        if 0 in sizes or sizes[0] % block:
            raise BadInput(f"{name} has rows of {sizes[0]} values, and {kind.name} stores {block} together")
        return name, tuple(reversed(sizes)), kind, offset
