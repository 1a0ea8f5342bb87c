"""How fast this machine multiplies, for programs that get a cache of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from knowledge_compression.cache import cache_folder
from knowledge_compression.models.device import Device, measured_bfloat16_gain


def known_findings(cache: Path) -> None:
    """Put what a program of one thread measures into an empty cache: where bfloat16 is slow, that takes seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured_bfloat16_gain(Device.of(torch.device("cpu")))  # kept in the cache of all tests
    finally:
        torch.set_num_threads(threads)
    for found in (cache_folder() / "findings").glob("bfloat16-*"):
        shutil.copytree(found, cache / "findings" / found.name)
