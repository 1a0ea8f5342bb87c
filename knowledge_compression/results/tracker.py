"""Trackers show runs while they are in progress: the interface, and the tracker that shows nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from knowledge_compression.results.store import Run


class TrackedRun(Protocol):
    """One run in a tracker."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of a step, e.g. the training loss."""
        ...

    def finish_with(self, run: Run, model: Path | None = None) -> None:
        """Log the result; ``model`` is the folder of the compressed model, if one was saved."""
        ...


class Tracker(Protocol):
    """A tracker; runs are always closed, even if they fail."""

    def track(self, run_id: str, settings: Mapping[str, Any]) -> Any:
        """A context manager that yields the :class:`TrackedRun`."""
        ...


@dataclass(frozen=True)
class NoTracker:
    """Show runs nowhere."""

    @contextmanager
    def track(self, run_id: str, settings: Mapping[str, Any]) -> Iterator[TrackedRun]:
        """A run that nobody watches."""
        yield Unseen()


class Unseen:
    """A run that nobody watches."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Nothing."""

    def finish_with(self, run: Run, model: Path | None = None) -> None:
        """Nothing."""

    def close(self, exit_code: int) -> None:
        """Nothing."""
