"""What is compared for each item: whether it is right or, if items are not right or wrong, a value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from knowledge_compression.statistics import Estimate


@dataclass(frozen=True)
class Measure:
    """A column of the item table, and how its differences are estimated and reported.

    Attributes:
        column: the column.
        gain: converts its values to numbers that are better when higher and can be subtracted and averaged.
        told: converts a mean difference in gain to the number shown; monotonic.
        unit: the unit of that number.
        items: the name of its items, in the plural.
        item: identifies an item within its task; rows with the same identifier are averaged.
        suite: the suite that measures it; empty if several do.
        metric: the suite's metric of it that is shown first.
        paired: whether two runs have the same items; otherwise two samples are compared.
        against_dense: whether the measure is the distance of a run's values from the baseline's, not the values.
    """

    column: str
    gain: Callable[[NDArray[Any]], NDArray[np.float64]]
    told: Callable[[float], float]
    unit: str
    items: str = "items"
    item: pl.Expr | None = None
    suite: str = ""
    metric: str = "accuracy"
    paired: bool = True
    against_dense: bool = False

    def words(self, effect: Estimate) -> str:
        """An effect and its interval in the unit of the measure."""
        shown = effect.through(self.told)
        if math.isnan(shown.low):
            return f"{shown.value:+.1f} {self.unit} (a single one of the {self.items} has no interval)"
        return f"{shown.value:+.1f} [{shown.low:+.1f}, {shown.high:+.1f}] {self.unit}"


def _hundredfold(share: float) -> float:
    return 100 * share


def _percent(log_ratio: float) -> float:
    return 100 * float(np.expm1(log_ratio))


def _percent_of_inverse(log_ratio: float) -> float:
    return _percent(-log_ratio)


ANSWERS = Measure("correct", lambda right: right.astype(np.float64), _hundredfold, "points")
FLIPS = Measure("correct", np.negative, _hundredfold, "points fewer flips", against_dense=True)  # of 0 or 1
KEPT = Measure("correct", lambda right: right.astype(np.float64), _hundredfold, "points of what was above chance")
SHARES = Measure("share", lambda share: share, _hundredfold, "points")
PERPLEXITY = Measure(
    "nll",
    np.negative,
    _percent_of_inverse,
    "% perplexity",
    items="windows of text",
    suite="perplexity",
    metric="perplexity",
)
SIMILARITY = Measure(
    "cosine",
    lambda cosine: cosine,
    _hundredfold,
    "hundredths of cosine",
    items="windows of text",
    item=pl.col("id").str.split(":").list.last(),  # layers of one window are not independent
    suite="similarity",
    metric="attention",
)
LATENCY = Measure(
    "seconds",
    lambda seconds: -np.log(seconds),  # a difference is then a ratio of times
    _percent,
    "% speed",
    items="repeats",
    suite="latency",
    metric="prefill_seconds",
    paired=False,
)
MEASURES = (ANSWERS, SHARES, PERPLEXITY, SIMILARITY, LATENCY)  # of which one is a suite's own
