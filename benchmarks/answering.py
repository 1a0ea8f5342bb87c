"""Contestants that need an environment of their own: processes that do what they are told and tell the seconds."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_SAID = "> "  # begins the lines that are for the other side


class Answering:
    """A process that calls :func:`answer`, from when it is ready."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> None:
        self._process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._said()

    def seconds(self, task: str) -> float:
        """Of one task, whose name is one line."""
        assert self._process.stdin is not None
        print(task, file=self._process.stdin, flush=True)
        return float(self._said())

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _said(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_SAID):
                return line.removeprefix(_SAID)
        raise RuntimeError("a process that should answer has ended")


def answer(do: Callable[[str], object]) -> None:
    """Do each task that is told, and tell its seconds, until nobody listens."""
    print(f"{_SAID}ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        do(line.strip())
        print(f"{_SAID}{time.perf_counter() - start}", flush=True)
