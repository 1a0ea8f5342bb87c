"""The workplace of an unfinished run: the parts that are already done."""

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
from knowledge_compression.writing import write_table

log = logging.getLogger(__name__)

KEPT = ".kept"  # in a workplace: needed only while the run is being made


class Workplace:
    """The storage of an unfinished run.

    Args:
        folder: created when the first part is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, content: bytes) -> None:
        """Put a file into the future folder of the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)

    def evaluation(self, suite: str, evaluate: Callable[[], Evaluation]) -> Evaluation:
        """The results for a suite from an interrupted attempt, or else from ``evaluate``, stored for later attempts."""
        items, rest = (self.folder / KEPT / f"{suite}.{kind}" for kind in ("parquet", "json"))
        if rest.is_file():  # written last, so the items are complete
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
        write_table(evaluation.items, items)
        scratch = rest.with_suffix(".partial")
        told = {field.name: getattr(evaluation, field.name) for field in fields(evaluation) if field.name != "items"}
        scratch.write_text(json.dumps(finite(told), default=str))
        scratch.rename(rest)
        return evaluation


def discard(folder: Path) -> None:
    """Remove a workplace and its content."""
    shutil.rmtree(folder, ignore_errors=True)
