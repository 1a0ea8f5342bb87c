"""A run in the making: the one process that does it, and what of it is done already."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
from filelock import LeaseCompromise, SoftFileLease, Timeout

from knowledge_compression.evaluation.suite import Evaluation
from knowledge_compression.results.shape import finite

log = logging.getLogger(__name__)

LEASE = 60.0  # seconds without a sign of life after which another process may take a run over
KEPT = ".kept"  # in a workplace: what only the making of the run needs, and not the run


class Workplace:
    """Where an unfinished run keeps what it has.

    Args:
        folder: made when the first thing is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, content: bytes) -> None:
        """Put a file into what will be the run's folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)

    def evaluation(self, suite: str, evaluate: Callable[[], Evaluation]) -> Evaluation:
        """What an interrupted attempt found for a suite, or what ``evaluate`` finds now, kept for the next one."""
        items, rest = (self.folder / KEPT / f"{suite}.{kind}" for kind in ("parquet", "json"))
        if rest.is_file():  # written last, so the items are whole
            try:
                found = json.loads(rest.read_text())
                metrics = {
                    name: math.nan if value is None else float(value) for name, value in found["metrics"].items()
                }
                kept = Evaluation(metrics, pl.read_parquet(items), found["description"])
            except (OSError, ValueError, KeyError, TypeError, AttributeError, pl.exceptions.PolarsError) as error:
                log.warning("%s: what an interrupted run kept is damaged (%s); it is asked anew", suite, error)
            else:
                log.info("%s: an interrupted run got so far", suite)
                return kept
        evaluation = evaluate()
        items.parent.mkdir(parents=True, exist_ok=True)
        evaluation.items.write_parquet(items)
        scratch = rest.with_suffix(".partial")
        scratch.write_text(
            json.dumps(finite({"metrics": evaluation.metrics, "description": evaluation.description}), default=str)
        )
        scratch.rename(rest)
        return evaluation


@contextmanager
def claimed(lock: Path, lease: float = LEASE) -> Iterator[None]:
    """Be the one process that holds ``lock``, on whichever host; others are waited for.

    The lock is a file that its owner touches every ``lease / 3`` seconds. It is stale when its owner is dead on this
    host, or when the file was not touched for ``lease`` seconds of the waiting process's own clock: clocks of different
    hosts are never compared. A process that slept longer than that goes on; both then write the same result, and the
    store keeps one.

    Raises:
        OSError: the lock cannot be written.
    """
    held = SoftFileLease(lock, lease_duration=lease, on_compromise=_warn, poll_interval=0.5)
    patience = 0.0
    while not held.is_locked:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=patience)
        except Timeout:
            log.info("another process is at %s; waiting for it", lock.stem)
            patience = -1.0  # for ever: a dead owner's lease ends
        except FileNotFoundError:  # the last one to leave took the empty folder with it
            continue
    try:
        yield
    finally:
        held.release()


def discard(folder: Path) -> None:
    """Remove a workplace with all it holds."""
    shutil.rmtree(folder, ignore_errors=True)


def _warn(loss: LeaseCompromise) -> None:
    log.warning("%s was taken over by another process (%s)", Path(loss.lock_file).stem, loss.reason)
