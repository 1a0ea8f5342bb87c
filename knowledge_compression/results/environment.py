"""The environment of a result: versions, hardware, time."""

from __future__ import annotations

import platform
import socket
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from knowledge_compression.results.secrets import without_secrets

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "lm-eval",
    "datasets",
    "hydra-core",
    "wandb",
    "polars",
    "knowledge-compression",
)


def environment() -> dict[str, Any]:
    """Versions, hardware and time, JSON-ready; no user name, no environment variables, no secrets."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "command": " ".join(without_secrets(sys.argv)),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
