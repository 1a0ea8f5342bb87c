"""The metrics of one run with the interval of each that is an estimate, from the items that it was computed from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import polars as pl

from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, accuracy, macro_accuracy, mean

# By the name of a metric within its suite: the columns it is made of, and how.
_MADE_OF: Mapping[str, tuple[list[str], Callable[[pl.DataFrame], Estimate]]] = {
    "accuracy": (["correct"], lambda items: accuracy(items["correct"].to_numpy())),
    "accuracy_macro": (["correct", "task"], lambda items: macro_accuracy(_by_task(items, pl.col("correct")))),
    "average": (["correct", "task"], lambda items: macro_accuracy(_by_task(items, pl.col("correct")))),
    "mrr": (["rank"], lambda items: mean((1 / items["rank"]).fill_null(0.0).to_numpy())),
    "perplexity": (["nll"], lambda items: mean(items["nll"].to_numpy(), np.exp)),
}
_TOP = re.compile(r"top(\d+)(_macro)?")
_PARTS = {"head": "bin", "middle": "bin", "tail": "bin", "seen": "asked_as", "held_out": "asked_as"}


def with_intervals(run: Run) -> dict[str, tuple[float, Estimate | None]]:
    """The metrics of a run (those of single tasks and layers left out) and, where they are estimates, their intervals.

    What is no estimate has none: counts, chance and majority, which follow from the questions alone.
    """
    there = set(run.scan_items().collect_schema())
    found: dict[str, tuple[float, Estimate | None]] = {}
    for metric, value in run.metrics.items():
        suite, _, name = metric.partition(".")
        if "." not in name:
            found[metric] = value, _estimate(run, suite, name, there)
    return found


def _estimate(run: Run, suite: str, name: str, there: set[str]) -> Estimate | None:
    condition = pl.col("suite") == suite
    columns, make = _MADE_OF.get(name, ([], None))
    if part := _PARTS.get(name):
        columns, make = _MADE_OF["accuracy"]
        condition &= pl.col(part) == name if part in there else pl.lit(value=False)
    elif top := _TOP.fullmatch(name):
        k, macro = int(top[1]), top[2]
        within = (pl.col("rank") <= k).fill_null(value=False)
        columns = ["rank", "task"]
        make = lambda items: (  # noqa: E731 - one of the ways above, with its k
            macro_accuracy(_by_task(items, within)) if macro else accuracy(items.select(within)["rank"].to_numpy())
        )
    if make is None or not there.issuperset(columns):
        return None
    items = run.scan_items().filter(condition).select(columns).collect()
    if columns[0] != "rank":  # without a rank the answer was not found; without a right answer there is no item
        items = items.drop_nulls(columns[0])
    return make(items) if items.height else None


def _by_task(items: pl.DataFrame, right: pl.Expr) -> list[np.ndarray]:
    return [part["right"].to_numpy() for part in items.with_columns(right.alias("right")).partition_by("task")]
