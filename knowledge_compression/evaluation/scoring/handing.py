"""Objects with tensors handed to other processes: the tensors once, through a file without a name.

The file lies in the temporary folder and is gone with the last process that has it open, however that ends. It is
mapped privately, so the processes share its pages until one writes to them. (Shared memory would be as good, but
containers often limit it to 64 MB, and exceeding that kills a process.)
"""

from __future__ import annotations

import io
import mmap
import pickle
import tempfile
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

_ALIGNED = 64  # bytes: the products of some libraries depend on where a matrix begins


class _Bytes(NamedTuple):
    """Where in the file the bytes of a storage are, and on which kind of device they were."""

    start: int
    length: int
    device: str


class _Packer(pickle.Pickler):
    """Pickles to a buffer, with the bytes of tensors in a file; named objects are left to the receiver."""

    def __init__(self, buffer: io.BytesIO, file: IO[bytes] | None, named: Mapping[str, Any]) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._file = file
        self._names = {id(value): name for name, value in named.items()}
        self._written: dict[int, _Bytes] = {}
        self._kept: list[Any] = []  # an address stands for a storage only while that lives

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Bytes):
            return tuple(obj)
        return self._names.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) not in (Tensor, nn.Parameter) or obj.layout != torch.strided or obj.is_quantized or obj.is_meta:
            return NotImplemented
        if self._file is None:  # a result
            kept = obj.detach().cpu().contiguous()
            return _from_array, (kept.view(-1).view(torch.uint8).numpy(), kept.dtype, tuple(obj.shape))
        stored = self._write(obj.detach().untyped_storage())
        place = (obj.storage_offset(), tuple(obj.shape), obj.stride())
        own = dict(vars(obj)) if isinstance(obj, nn.Parameter) else None
        return _from_bytes, (stored, obj.dtype, place, obj.requires_grad, own)

    def _write(self, storage: Any) -> _Bytes:
        assert self._file is not None
        key = storage.data_ptr()
        if key not in self._written or not key:  # empty ones have no address
            self._file.seek(-self._file.seek(0, io.SEEK_END) % _ALIGNED, io.SEEK_END)
            found = _Bytes(self._file.tell(), storage.nbytes(), storage.device.type)
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            self._file.write(flat.cpu().numpy().data)
            self._written[key] = found
            self._kept.append(storage)
        return self._written[key]


class _Unpacker(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, file: int | None, named: Mapping[str, Any], place: torch.device) -> None:
        super().__init__(buffer)
        self._named, self._place = named, place
        self._map = None if file is None else mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
        self._read: dict[_Bytes, Tensor] = {}

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, str):
            return self._named[pid]
        asked = _Bytes(*pid)
        if asked not in self._read:
            found = torch.empty(0, dtype=torch.uint8)
            if asked.length:
                assert self._map is not None
                found = torch.frombuffer(self._map, dtype=torch.uint8, count=asked.length, offset=asked.start)
            self._read[asked] = found if asked.device == "cpu" else found.to(self._place)
        return self._read[asked]


def packed(value: Any, named: Mapping[str, Any] | None = None) -> bytes:
    """A request or a result as bytes; its tensors, if any, are in them and arrive on the CPU.

    Args:
        value: plain data and tensors.
        named: objects that the receiver has already, by name.
    """
    buffer = io.BytesIO()
    _Packer(buffer, None, named or {}).dump(value)
    return buffer.getvalue()


def unpacked(data: bytes, named: Mapping[str, Any] | None = None) -> Any:
    """What :func:`packed` was given."""
    return _Unpacker(io.BytesIO(data), None, named or {}, torch.device("cpu")).load()


def handed_over(value: Any) -> tuple[bytes, IO[bytes]]:
    """An object as bytes, and a file with those of its tensors.

    Raises:
        OSError: there is no room for the file.
        Exception: a part of it cannot be pickled.
    """
    buffer, file = io.BytesIO(), tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        _Packer(buffer, file, {}).dump(value)
        if not file.seek(0, io.SEEK_END):
            file.write(b"\0")  # nothing cannot be mapped
        file.flush()
    except BaseException:
        file.close()
        raise
    return buffer.getvalue(), file


def taken_over(data: bytes, file: int, place: torch.device) -> Any:
    """What :func:`handed_over` was given; tensors that were not on the CPU are on ``place``.

    Args:
        data: the bytes.
        file: descriptor of the open file.
        place: a device of this process.
    """
    return _Unpacker(io.BytesIO(data), file, {}, place).load()


def _from_array(array: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(array.copy() if not array.flags.writeable else array).view(dtype).view(shape)


def _from_bytes(
    stored: Tensor,
    dtype: torch.dtype,
    place: tuple[int, tuple[int, ...], tuple[int, ...]],
    requires_grad: bool,
    own: dict[str, Any] | None,
) -> Tensor:
    found = torch.empty(0, dtype=dtype, device=stored.device)
    found.set_(stored.untyped_storage(), *place)
    if own is None:
        return found.requires_grad_(requires_grad)
    parameter = nn.Parameter(found, requires_grad=requires_grad)
    vars(parameter).update(own)
    return parameter
