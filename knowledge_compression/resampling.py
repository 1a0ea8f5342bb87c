"""Bootstrap and permutation tests over items and seeds: scipy draws, and matrix products compute many means at once."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowledge_compression.heavy import stats

CONFIDENCE = 0.95
# Resamples of a bootstrap. With several seeds they also give the p-value, which must stay small after a correction for
# a hundred comparisons. With one seed they give only an interval; 2,000 find its ends to within 1.5 % of its width.
RESAMPLES, RESAMPLES_OF_ONE_SEED = 9_999, 1_999
FLIPS = 100_000  # permutations of a test, for the same reason
_BATCH = 250_000  # items drawn at a time, which fit in a processor's cache
_ANSWERS = 10_000_000  # processed under the same resamples: 80 MB
SEED = 0  # resampling belongs to the analysis, not to a run: the same store gives the same intervals


@dataclass(frozen=True)
class Ends:
    """The alternatives of an interval and of a two-sided p-value against zero."""

    low: float
    high: float
    p: float


def bootstrap(
    figures: Sequence[Sequence[NDArray[Any]]],
    statistic: Callable[..., NDArray[np.float64]] = np.positive,
    confidence: float = CONFIDENCE,
    resamples: int | None = None,
) -> list[Ends]:
    """Percentile intervals by ``scipy.stats.bootstrap`` over items and, where there are several, seeds.

    Items and seeds are crossed: every seed answers every item. So both are redrawn in each resample, independently of
    each other and identically for everything compared (Owen, 2007, "The pigeonhole bootstrap"); this is conservative.
    scipy sees two independent samples, the indices of the items and of the seeds. The number of draws of each is
    counted, and one matrix product then computes the means of all figures.

    Args:
        figures: for each figure, a table ``[samples, seeds, items]`` for each set of items that is resampled
            separately.
        statistic: function of the means of a set's samples, elementwise; results of several sets are averaged.
        confidence: of the two-sided intervals.
        resamples: their number; None takes as many as an interval needs and, with several seeds, a p-value.
    """
    alike: defaultdict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
    for place, figure in enumerate(figures):
        alike[tuple(table.shape for table in figure)].append(place)
    found: dict[int, Ends] = {}
    for places in _portions(alike):
        tables = [np.stack(of_all) for of_all in zip(*(figures[place] for place in places), strict=True)]
        values = _resampled(tables, statistic, resamples)
        ends = np.nanquantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], axis=-1)
        for place, low, high, resampled in zip(places, *ends, values, strict=True):
            found[place] = Ends(float(low), float(high), _two_sided(resampled))
    return [found[place] for place in range(len(figures))]


def _portions(alike: Mapping[tuple[tuple[int, ...], ...], list[int]]) -> Iterator[list[int]]:
    """Figures of one shape, as many at a time as the memory limit allows."""
    for shapes, places in alike.items():
        most = max(1, _ANSWERS // sum(map(math.prod, shapes)))
        yield from (places[start : start + most] for start in range(0, len(places), most))


def _resampled(
    tables: Sequence[NDArray[Any]], statistic: Callable[..., NDArray[np.float64]], resamples: int | None
) -> NDArray[np.float64]:
    """A statistic of the tables ``[figures, samples, seeds, items]`` in each resample: ``[figures, resamples]``."""
    figures, samples, seeds, _ = tables[0].shape
    columns = [table.reshape(-1, table.shape[-1]).T.astype(np.float64) for table in tables]
    lengths = [seeds, *map(len, columns)]
    drawn_of = [place for place, length in enumerate(lengths) if length > 1]  # with one there is nothing to draw

    def of_drawn(*drawn: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        shares: list[NDArray[np.float64]] = [np.ones((1, 1))] * len(lengths)
        for place, numbers in zip(drawn_of, drawn, strict=True):
            shares[place] = _counts(numbers, lengths[place]) / lengths[place]
        of_seeds, *of_items = shares
        values = np.zeros((figures, 1))
        for share, column in zip(of_items, columns, strict=True):
            by_seed = (share @ column).reshape(-1, figures, samples, seeds)
            values = values + statistic(*(by_seed * of_seeds[:, None, None]).sum(-1).T) / len(columns)
        return values

    if not drawn_of:
        return of_drawn(axis=-1)
    with warnings.catch_warnings():  # a resample without a right dense answer has no drop; the others have
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            [np.arange(lengths[place]) for place in drawn_of],
            of_drawn,
            n_resamples=resamples or (RESAMPLES if seeds > 1 else RESAMPLES_OF_ONE_SEED),
            batch=max(1, _BATCH // sum(lengths)),
            vectorized=True,
            method="percentile",
            rng=np.random.default_rng(SEED),
        )
    values: NDArray[np.float64] = result.bootstrap_distribution
    return values


def _counts(drawn: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """How often each of ``n`` was drawn in each resample: ``[resamples, n]`` from indices ``[resamples, draws]``."""
    apart = drawn + n * np.arange(len(drawn))[:, None]
    return np.bincount(apart.ravel(), minlength=n * len(drawn)).reshape(len(drawn), n)


def sign_flips(per_item: NDArray[np.float64]) -> float:
    """Two-sided p-value of a mean against zero, if each difference could equally have the other sign.

    Among items with equally large differences, the number of positive ones is binomial. So scipy's test draws one
    number per size of difference, not one per item.
    """
    sizes, kind, counts = np.unique(np.abs(per_item).round(9), return_inverse=True, return_counts=True)
    positive = np.bincount(kind, per_item > 0)
    rng = np.random.default_rng(SEED)

    def total(positives: NDArray[Any], axis: int) -> NDArray[np.float64]:
        # Sums in another order differ in the last digits and would not count as equal.
        return np.round((2 * positives - counts) @ sizes, 9)

    flips = stats.monte_carlo_test(
        positive,
        lambda size: rng.binomial(counts, 0.5, size=size),
        total,
        vectorized=True,
        n_resamples=FLIPS,
        batch=max(1, 6_000_000 // len(counts)),  # about 50 MB
    )
    return float(flips.pvalue)


def _two_sided(values: NDArray[np.float64]) -> float:
    """Twice the smaller share of resamples on either side of zero, counting the data themselves as one of them."""
    told = np.round(values[np.isfinite(values)], 9)  # a sum that is zero in another order counts as zero
    tail = min((told <= 0).sum(), (told >= 0).sum())
    return float(min(1.0, 2 * (1 + tail) / (1 + len(told))))
