"""A network larger than one device, divided over the GPUs, the memory and the disk of this machine by accelerate.

Every block stays in one place and the activations travel. Blocks for which no GPU has room lie in the machine's memory,
and those for which that has none on disk; each is brought to the device that computes while it runs.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from knowledge_compression.cache import cache_folder
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_FOR_ACTIVATIONS = 0.1  # of a GPU's free memory, unless the user sets a limit
_SCRATCH = "offloaded"  # in the cache: weights on disk in another dtype than that of the checkpoint


@dataclass(frozen=True)
class Spread:
    """The choice to divide a network over several devices, in the place of one device.

    Attributes:
        device: where it begins to compute: ``auto``, ``cuda`` (all GPUs), ``cuda:1`` (that one), or ``cpu``, which
            leaves the GPUs alone.
        max_memory: most bytes of weights on a GPU (by its number) and in memory (``cpu``); by default what is free.
    """

    device: str = "auto"
    max_memory: tuple[tuple[int | str, int], ...] = ()

    @classmethod
    def over(cls, device: str, max_memory: Mapping[str, int | str] | None) -> Spread:
        """The choice that the user typed.

        Raises:
            BadInput: a limit names no device or is no size.
        """
        return cls(device, tuple((_place(name), _bytes(name, size)) for name, size in (max_memory or {}).items()))

    def told(self) -> dict[str, Any]:
        """The user's settings, for the record."""
        limits = {str(name): size for name, size in self.max_memory}
        return {"device": self.device, "device_map": "auto", "max_memory": limits or None}

    def room(self, main: torch.device) -> dict[int | str, int]:
        """Bytes of weights that each device may hold; the rest lies on disk.

        Args:
            main: the device on which it begins to compute.

        Raises:
            BadInput: a limit names a GPU that is not there, or not used.
        """
        from accelerate.utils import get_max_memory

        free = {name: int(size) for name, size in get_max_memory().items()} if main.type != "cpu" else {}
        free = {
            name: int(size * (1 - _FOR_ACTIVATIONS))
            for name, size in free.items()
            if name != "cpu" and main.index in (None, name)
        }
        free["cpu"] = psutil.virtual_memory().available
        limits = dict(self.max_memory)
        if unknown := [str(name) for name in limits if name not in free]:
            raise BadInput(
                f"max_memory names {', '.join(unknown)}, and this run divides its model over "
                f"{', '.join(map(str, free))}; name those, e.g. max_memory={{cpu: 20GiB}}"
            )
        return free | limits

    def loading(self, main: torch.device) -> dict[str, Any]:
        """The arguments by which transformers divides a network while it is loaded."""
        return {"device_map": "auto", "max_memory": self.room(main), "offload_folder": str(_scratch())}


def keep_scratch(network: Any, folder: str) -> None:
    """Delete the folder of offloaded weights once nothing refers to the network any more."""
    weakref.finalize(network, shutil.rmtree, folder, ignore_errors=True)


def is_spread(network: Any) -> bool:
    """Whether a network is divided: accelerate moves its activations, and weights of it may be elsewhere."""
    places = set(getattr(network, "hf_device_map", {}).values())
    return len(places) > 1 or "disk" in places


def main_device(network: Any) -> torch.device:
    """The device on which a divided network reads its input and gives its logits, or on which a part of it computes."""
    return torch.device(network._hf_hook.execution_device)


def bytes_by_place(network: Any) -> dict[str, int]:
    """How many bytes of a divided network's weights lie on each device and on disk; tied ones count once."""
    found: Counter[str] = Counter()
    seen = set[int]()
    for path, place in network.hf_device_map.items():
        name = f"cuda:{place}" if isinstance(place, int) else str(place)
        for weight in network.get_submodule(path).parameters():
            found[name] += weight.nbytes if id(weight) not in seen else 0
            seen.add(id(weight))
    return dict(found)


def at_hand(network: Any, name: str, weight: Tensor) -> Tensor:
    """A weight of a network by its name, read from where a divided one keeps it."""
    if not (weight.is_meta and is_spread(network)):
        return weight
    from transformers.integrations.accelerate import load_offloaded_parameter

    return load_offloaded_parameter(network, name)


def _place(name: int | str) -> int | str:
    number = re.fullmatch(r"(?:cuda:)?(\d+)", str(name))
    if number is None and name != "cpu":
        raise BadInput(
            f"max_memory names {name}; it takes numbers of GPUs and cpu, e.g. max_memory={{0: 20GiB, cpu: 60GiB}}"
        )
    return int(number[1]) if number else "cpu"


def _bytes(name: int | str, size: int | str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", str(size))
    if found is None or not (count := int(float(found[1]) * _UNITS.get(found[2] or "", 1))):
        raise BadInput(f"max_memory.{name}={size} is no size; give e.g. 20GiB, 500MB, or a number of bytes")
    return count


def _scratch() -> Path:
    """A new folder for this process's offloaded weights; those that killed processes left behind are deleted."""
    parent = cache_folder() / _SCRATCH
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.iterdir():
        host, _, owner = left.name.rpartition("-")[0].rpartition("-")
        if host == platform.node() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{platform.node()}-{os.getpid()}-", dir=parent))
