"""An unfinished run: the parts of it that are already done."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from knowledge_compression.evaluation.suite import Evaluation
from knowledge_compression.heavy import pl
from knowledge_compression.results.shape import finite

log = logging.getLogger(__name__)

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
                kept = Evaluation(
                    metrics,
                    pl.read_parquet(items, glob=False),
                    found["description"],
                    found.get("fallbacks", []),
                    found.get("not_finite", 0),
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError, pl.exceptions.PolarsError) as error:
                log.warning("%s: the answers of an interrupted run are damaged (%s); asking again", suite, error)
            else:
                log.info("%s: continuing from an interrupted run", suite)
                return kept
        evaluation = evaluate()
        items.parent.mkdir(parents=True, exist_ok=True)
        evaluation.items.write_parquet(items)
        scratch = rest.with_suffix(".partial")
        told = {field.name: getattr(evaluation, field.name) for field in fields(evaluation) if field.name != "items"}
        scratch.write_text(json.dumps(finite(told), default=str))
        scratch.rename(rest)
        return evaluation


def discard(folder: Path) -> None:
    """Remove a workplace with all it holds."""
    shutil.rmtree(folder, ignore_errors=True)
