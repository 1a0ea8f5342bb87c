"""The metrics of runs, with intervals for those that are estimates, computed from their items."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from knowledge_compression.analysis.measures import SIMILARITY
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, accuracies, macro_accuracies, means, medians

Estimates = Callable[[Sequence[Any]], list[Estimate]]
_perplexities: Estimates = partial(means, of_mean=np.exp)
_root_mean_squares: Estimates = partial(means, of_mean=np.sqrt)

# The columns of each metric, the values taken from them, and the kind of estimate, by its name within its suite.
_MADE_OF: Mapping[str, tuple[list[str], Callable[[pl.DataFrame], Any], Estimates]] = {
    "accuracy": (["correct"], lambda items: items["correct"].to_numpy(), accuracies),
    "accuracy_macro": (["correct", "task"], lambda items: _by_task(items, pl.col("correct")), macro_accuracies),
    "average": (["correct", "task"], lambda items: _by_task(items, pl.col("correct")), macro_accuracies),
    "mrr": (["rank"], lambda items: (1 / items["rank"]).fill_null(0.0).to_numpy(), means),
    "mrr_macro": (
        ["rank", "task"],
        lambda items: _by_task(items, (1 / pl.col("rank")).fill_null(0.0)),
        macro_accuracies,
    ),
    "perplexity": (["nll"], lambda items: items["nll"].to_numpy(), _perplexities),
    "attention": (["cosine", "task", "id"], lambda items: _by_window(items, "attention"), means),
    "activation": (["cosine", "task", "id"], lambda items: _by_window(items, "activation"), means),
    "kl": (["kl"], lambda items: _by_item(items["kl"]), means),
    "reverse_kl": (["reverse_kl"], lambda items: _by_item(items["reverse_kl"]), means),
    "same_top": (["same_top"], lambda items: _by_item(items["same_top"].cast(pl.List(pl.Float64))), means),
    "gold_rms": (
        ["gold_change"],
        lambda items: _by_item(items["gold_change"].list.eval(pl.element().pow(2))),
        _root_mean_squares,
    ),
}
_TOP = re.compile(r"top(\d+)(_macro)?")
_TIMED = re.compile(r"(\w+)_seconds")
_PARTS = {"head": "bin", "middle": "bin", "tail": "bin", "seen": "asked_as", "held_out": "asked_as"}


def with_intervals(runs: Sequence[Run]) -> dict[str, dict[str, tuple[float, Estimate | None]]]:
    """The metrics of runs (without those of single tasks and layers) and, for estimates, their intervals.

    Counts, chance and majority, which follow from the questions alone, have no interval.

    Returns:
        By run id, then by metric.
    """
    found: dict[str, dict[str, tuple[float, Estimate | None]]] = {run.id: {} for run in runs}
    estimated: defaultdict[Estimates, list[tuple[str, str, Any]]] = defaultdict(list)
    for run in runs:
        there = set(run.scan_items().collect_schema())
        for metric, value in run.metrics.items():
            suite, _, name = metric.partition(".")
            if "." in name:
                continue
            found[run.id][metric] = value, None
            if made := _made(run, suite, name, there):
                estimated[made[0]].append((run.id, metric, made[1]))
    for estimates, asked in estimated.items():
        for (run_id, metric, _), estimate in zip(asked, estimates([values for *_, values in asked]), strict=True):
            found[run_id][metric] = found[run_id][metric][0], estimate
    return found


def _made(run: Run, suite: str, name: str, there: set[str]) -> tuple[Estimates, Any] | None:
    """How a metric is estimated, and from which values."""
    condition = pl.col("suite") == suite
    columns, values_of, estimates = _MADE_OF.get(name, ([], None, accuracies))
    if part := _PARTS.get(name):
        columns, values_of, estimates = _MADE_OF["accuracy"]
        condition &= pl.col(part) == name if part in there else pl.lit(value=False)
    elif top := _TOP.fullmatch(name):
        within = (pl.col("rank") <= int(top[1])).fill_null(value=False)
        columns, estimates = ["rank", "task"], macro_accuracies if top[2] else accuracies
        values_of = lambda items: (  # noqa: E731 - one of the ways above, with its k
            _by_task(items, within) if top[2] else items.select(within)["rank"].to_numpy()
        )
    elif timed := _TIMED.fullmatch(name):
        columns, values_of, estimates = ["seconds"], lambda items: items["seconds"].to_numpy(), medians
        condition &= pl.col("task") == timed[1]
    if values_of is None or not there.issuperset(columns):
        return None
    if columns[0] == "correct" and run.answers(suite, "share").height:  # these count in the metric too
        return None
    items = run.scan_items().filter(condition).select(columns).collect()
    if (
        columns[0] != "rank"
    ):  # without a rank, the answer was not found; without a right answer, the item does not count
        items = items.drop_nulls(columns[0])
    return (estimates, values_of(items)) if items.height else None


def _by_window(items: pl.DataFrame, kind: str) -> np.ndarray:
    """Similarity of each window of text, over the layers."""
    windows = items.filter(pl.col("task") == kind).group_by(SIMILARITY.item, maintain_order=True)
    return windows.agg(pl.col("cosine").mean())["cosine"].to_numpy()


def _by_item(positions: pl.Series) -> np.ndarray:
    """One value per item. Their mean is the mean over all positions, and varies like it when items are resampled.

    The mean over positions is a ratio of sums over items; this is its linear part (Cochran, 1977, 2.11).

    Args:
        positions: lists with one entry per position.
    """
    positions = positions.list.drop_nulls().cast(pl.List(pl.Float64))
    sums, counts = positions.list.sum().to_numpy(), positions.list.len().to_numpy()
    if not counts.sum():
        return np.empty(0)
    mean = sums.sum() / counts.sum()
    return mean + (sums - mean * counts) / counts.mean()


def _by_task(items: pl.DataFrame, right: pl.Expr) -> list[np.ndarray]:
    return [part["right"].to_numpy() for part in items.with_columns(right.alias("right")).partition_by("task")]
