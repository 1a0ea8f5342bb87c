"""How much memory a piece of work takes at its worst moment, above what was in use when it began."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """The worst moment.

    Attributes:
        bytes: above the start; None while unknown or where the system does not tell.
        source: what was measured.
    """

    bytes: int | None = None
    source: str = "not told by this system"


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the body: a GPU's allocated memory, or the process's resident memory on Linux.

    Resident memory counts everything in the process, with the scratch of its libraries. Where measurements are nested,
    an outer one sees only what came after the inner one began.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes, peak.source = torch.cuda.max_memory_allocated(device) - before, "allocated on the device"
    elif device.type == "cpu" and os.access(_CLEAR, os.W_OK):
        _CLEAR.write_text("5")  # sets the high-water mark back to what is resident now
        before = _high_water()
        yield peak
        peak.bytes, peak.source = _high_water() - before, "resident in the process"
    else:
        yield peak


def peak_of_process(device: torch.device) -> int:
    """Bytes at the worst moment so far: allocated on a GPU, else resident with all libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _high_water() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
