"""How long a piece of work takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def timed(device: torch.device, work: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that ``work`` takes from an idle device until everything it started there is done, and its result."""
    _wait_for(device)
    start = time.perf_counter()
    result = work()
    _wait_for(device)
    return time.perf_counter() - start, result


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
