"""How many answers compression changed, whether or not the accuracy changed: flips and all flips of a ledger."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import polars as pl

from knowledge_compression.analysis.ledger import GAINED, KEPT, LOST, NEVER_KNOWN
from knowledge_compression.statistics import Estimate, mcnemar, mean_difference, proportion


@dataclass(frozen=True)
class Flips:
    """The changes between the answers of two runs to the same items, see :mod:`.ledger`.

    Attributes:
        items: number of items that both answer.
        kept, lost, gained, never_known: number of items with each fate.
        wrong_otherwise: number of never known items that are answered differently; None if a run has no answers as
            text.
        flips, all_flips: share of the items, with Wilson's interval over items (each is one pair of answers).
    """

    items: int
    kept: int
    lost: int
    gained: int
    never_known: int
    wrong_otherwise: int | None
    flips: Estimate
    all_flips: Estimate | None


def flips_of(ledger: pl.DataFrame) -> Flips | None:
    """The flips in the :func:`~.ledger.fates` of two runs or in a part of them; None if it is empty."""
    if ledger.is_empty():
        return None
    n = ledger.height
    counts = Counter(ledger["fate"].to_list())
    flips = counts[LOST] + counts[GAINED]
    known = ledger["changed"].null_count() == 0
    changed = int(ledger["changed"].sum()) if known else 0
    return Flips(
        n,
        counts[KEPT],
        counts[LOST],
        counts[GAINED],
        counts[NEVER_KNOWN],
        changed - flips if known else None,
        proportion(flips, n),
        proportion(changed, n) if known else None,
    )


def change_in_accuracy(ledger: pl.DataFrame) -> Estimate:
    """Compressed minus dense, with a paired bootstrap interval over items and McNemar's exact p."""
    before = ledger["fate"].is_in([KEPT, LOST]).to_numpy()
    after = ledger["fate"].is_in([KEPT, GAINED]).to_numpy()
    change = mean_difference(after.astype(float) - before.astype(float))
    return Estimate(change.value, change.low, change.high, ledger.height, mcnemar(before, after))
