"""In which floating type a device multiplies, and how fast: measured once for each kind of device."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import statistics
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from knowledge_compression.cache import cached_folder
from knowledge_compression.errors import BadInput
from knowledge_compression.timing import timed

log = logging.getLogger(__name__)

SCORING_DTYPES = ("model", "auto", "bfloat16")
_CPU_INFO = Path("/proc/cpuinfo")
_KIND = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")  # lines that tell processors apart
_SHAPE = (1024, 768, 768)  # tokens, inputs and outputs of a product that is timed
_ROUNDS = 9
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

    Weights are turned as they are needed, so that they take no memory beside those that are there.
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
    told = json.dumps([kind, torch.get_num_threads(), torch.__version__, _SHAPE])
    key = hashlib.sha256(told.encode()).hexdigest()[:16]

    def make(folder: Path) -> None:
        gain = _measured_gain(device)
        log.info("products of bfloat16 are %.1f times as fast as those of float32 on this %s", gain, device.type)
        (folder / "bfloat16.json").write_text(json.dumps({"gain": gain, "device": kind}))

    return float(json.loads((cached_folder(f"precision/{key}", make) / "bfloat16.json").read_text())["gain"])


def _measured_gain(device: torch.device) -> float:
    tokens, inputs, outputs = _SHAPE
    states, weight = torch.ones(tokens, inputs, device=device), torch.ones(outputs, inputs, device=device)
    operands = {dtype: (states.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    with torch.inference_mode():
        for _ in range(_ROUNDS):  # in turn, so that a busy moment hurts both
            for dtype, (left, right) in operands.items():
                seconds[dtype].append(timed(device, partial(nn.functional.linear, left, right))[0])
    return statistics.median(seconds[torch.float32]) / statistics.median(seconds[torch.bfloat16])
