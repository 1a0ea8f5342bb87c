"""In which floating type a device multiplies, and how fast: measured once for each kind of device."""

from __future__ import annotations

import logging
import platform
import statistics
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

from knowledge_compression.cache import kept_finding
from knowledge_compression.errors import BadInput
from knowledge_compression.timing import timed

log = logging.getLogger(__name__)

SCORING_DTYPES = ("model", "auto", "bfloat16")
_CPU_INFO = Path("/proc/cpuinfo")
_KIND = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")  # lines that tell processors apart
_SIDE, _REPEATS = 1024, 7  # of the matrix product that measures a device's rate
_CLEARLY = 1.25  # times as fast, so that what goes around the products does not eat the gain


def resolve_scoring_dtype(choice: str, device: torch.device) -> torch.dtype | None:
    """The type that products of scoring are done in; None leaves them to the model's own.

    Args:
        choice: ``model``, ``bfloat16``, or ``auto``: bfloat16 where the device multiplies it clearly faster.
        device: where they are done.

    Raises:
        BadInput: there is no such choice.
    """
    if choice not in SCORING_DTYPES:
        raise BadInput(f"scoring_dtype={choice} does not exist; choose one of {', '.join(SCORING_DTYPES)}")
    chosen = choice == "bfloat16" or (choice == "auto" and bfloat16_gain(device) > _CLEARLY)
    return torch.bfloat16 if chosen else None


def multiplied_in(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Products of float32 networks in another type until the end of the context; all else stays as it is.

    Weights are turned anew for each product: they take no memory beside those that are there, and one that was
    compressed in between is not used as it was before.
    """
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=False)


def processor() -> dict[str, str]:
    """What Linux tells of the first processor's kind, e.g. ``vendor_id``; elsewhere what Python knows."""
    if not _CPU_INFO.is_file():
        return {"model name": platform.processor() or platform.machine()}
    lines = _CPU_INFO.read_text().split("\n\n")[0].splitlines()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {key: told[key] for key in _KIND if key in told}


@cache
def bfloat16_gain(device: torch.device) -> float:
    """How many times faster than float32 the device multiplies bfloat16; measured once, kept in the user's cache."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else [device.type, processor()]

    def find() -> float:
        gain = products_a_second(device, torch.bfloat16) / products_a_second(device, torch.float32)
        log.info("products of bfloat16 are %.1f times as fast as those of float32 on this %s", gain, device.type)
        return gain

    return float(kept_finding("bfloat16", [kind, torch.get_num_threads(), torch.__version__, _SIDE], find))


def products_a_second(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product, median of a few."""
    a = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    seconds = [timed(device, lambda: a @ a)[0] for _ in range(_REPEATS + 1)]  # the first one warms up
    return 2 * _SIDE**3 / statistics.median(seconds[1:])
