"""Peak memory of a piece of work, above what was in use when it began."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from knowledge_compression.heavy import torch

_KEPT = 1 << 30  # bytes that the allocator retains for the next tensors
_MAPPED = 1 << 25  # bytes from which on a block is mapped separately; the maximum in glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Peak memory.

    Attributes:
        bytes: peak above the start; None while unknown or if the system does not report it.
        source: what was measured.
    """

    bytes: int | None = None
    source: str = "not reported by this system"


@lru_cache(maxsize=1)
def reuse_freed_memory() -> None:
    """Make the C library retain up to a gigabyte of freed CPU tensors for the next ones; once per process.

    glibc returns freed blocks of some megabytes to the system, which clears every page before the next use. Other C
    libraries are left unchanged.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the body: a GPU's allocated memory, or the process's resident memory on Linux.

    Resident memory counts everything in the process, including libraries' scratch memory. If measurements are nested,
    an outer one sees only what came after the inner one began.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes, peak.source = torch.cuda.max_memory_allocated(device) - before, "allocated on the device"
    elif device.type == "cpu" and os.access(_CLEAR, os.W_OK):
        if (libc := _glibc()) is not None:
            libc.malloc_trim(0)  # retained memory is not in use
        _CLEAR.write_text("5")  # resets the high-water mark to what is resident now
        before = _high_water()
        yield peak
        peak.bytes, peak.source = _high_water() - before, "resident in the process"
    else:
        yield peak


def peak_of_process(device: torch.device) -> int:
    """Peak bytes so far: allocated on a GPU, otherwise resident, including libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _high_water() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that a device or the CPU's allocator is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
