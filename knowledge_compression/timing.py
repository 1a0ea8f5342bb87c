"""Timing of work on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from knowledge_compression.heavy import torch

Result = TypeVar("Result")


def timed(device: torch.device, work: Callable[[], Result]) -> tuple[float, Result]:
    """The seconds that ``work`` takes on an idle device, until everything it started has finished, and its result."""
    _wait_for(device)
    start = time.perf_counter()
    result = work()
    _wait_for(device)
    return time.perf_counter() - start, result


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
