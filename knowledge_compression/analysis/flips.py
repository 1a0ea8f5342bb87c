"""Flips: how many answers compression changed, whether or not the accuracy changed.

Dutta et al. (2024), "Accuracy is Not All You Need": flips are the answers that go from right to wrong or from wrong to
right; all flips also count wrong answers that became other wrong answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from knowledge_compression.analysis.ledger import GAINED, KEPT, LOST, NEVER_KNOWN, fates
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, mcnemar, mean_difference, proportion

WRONG_OTHERWISE = "wrong otherwise"


@dataclass(frozen=True)
class Flips:
    """The changes between the answers of two runs to the same items.

    Attributes:
        items: number of items that both answer.
        kept, lost, gained, never_known: number of items with each fate.
        wrong_otherwise: number of those never known that are answered differently; None if a run has no answers as
            text.
        flips, all_flips: share of the items, with Wilson's interval over items (each is one pair of answers).
        change: in accuracy, compressed minus dense, with a paired bootstrap interval over items and McNemar's exact p.
    """

    items: int
    kept: int
    lost: int
    gained: int
    never_known: int
    wrong_otherwise: int | None
    flips: Estimate
    all_flips: Estimate | None
    change: Estimate


def changes(dense: Run, compressed: Run, suite: str) -> pl.DataFrame:
    """The ledger of two runs with what changed.

    Returns:
        :func:`~.ledger.fates` with ``flip`` and ``changed``: whether the item counts among the flips, and among all
        flips (null if one of the answers is not known as text).
    """
    wrong_otherwise = (pl.col("fate") == NEVER_KNOWN) & (pl.col("before") != pl.col("after"))
    flip = pl.col("fate").is_in([LOST, GAINED])
    return fates(dense, compressed, suite).with_columns(flip=flip, changed=flip | wrong_otherwise)


def flips_of(ledger: pl.DataFrame) -> Flips | None:
    """The flips in :func:`changes` or in a part of it; None if it is empty."""
    if ledger.is_empty():
        return None
    n = ledger.height
    counts = {fate: int((ledger["fate"] == fate).sum()) for fate in (KEPT, LOST, GAINED, NEVER_KNOWN)}
    flips = counts[LOST] + counts[GAINED]
    known = ledger["changed"].null_count() == 0
    changed = int(ledger["changed"].sum()) if known else 0
    before = ledger["fate"].is_in([KEPT, LOST]).to_numpy()
    after = ledger["fate"].is_in([KEPT, GAINED]).to_numpy()
    change = mean_difference(after.astype(float) - before.astype(float))
    return Flips(
        n,
        counts[KEPT],
        counts[LOST],
        counts[GAINED],
        counts[NEVER_KNOWN],
        changed - flips if known else None,
        proportion(flips, n),
        proportion(changed, n) if known else None,
        Estimate(change.value, change.low, change.high, n, mcnemar(before, after)),
    )
