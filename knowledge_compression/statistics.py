"""Paired tests and intervals over items, pooled over seeds, computed by scipy and statsmodels.

Bootstrap functions exist for one figure (``drop``) and for many (``drops``): figures over equally many items share
their resamples, which take most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats import contingency_tables
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from knowledge_compression.heavy import stats
from knowledge_compression.resampling import CONFIDENCE, RESAMPLES_OF_ONE_SEED, SEED, Ends, bootstrap, sign_flips


@dataclass(frozen=True)
class Estimate:
    """A figure with its confidence interval and, for a difference, its p-value.

    Attributes:
        value, low, high: the figure and its 95 % confidence interval.
        p: two-sided p-value against zero; None if the figure is not a difference.
        n: number of items behind it.
    """

    value: float
    low: float
    high: float
    n: int
    p: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def through(self, function: Callable[[float], float]) -> Estimate:
        """Apply a monotonic function to the figure and its interval."""
        low, high = sorted((function(self.low), function(self.high)))
        return replace(self, value=function(self.value), low=low, high=high)


def accuracy(correct: NDArray[np.bool_], confidence: float = CONFIDENCE) -> Estimate:
    """Share of items answered right, with Wilson's interval, or a bootstrap over items and seeds if there are several
    seeds.

    Args:
        correct: ``[items]`` or ``[seeds, items]``.
        confidence: of the two-sided interval.
    """
    return accuracies([correct], confidence)[0]


def accuracies(correct: Sequence[NDArray[np.bool_]], confidence: float = CONFIDENCE) -> list[Estimate]:
    """:func:`accuracy` of each table."""
    tables = [np.atleast_2d(one) for one in correct]
    # If all answers are right, or all wrong, there is nothing to resample, whatever the number of seeds.
    several = [place for place, table in enumerate(tables) if len(table) > 1 and np.unique(table).size > 1]
    found = [proportion(int(table[0].sum()), table.shape[1], confidence) for table in tables]
    for place, ends in zip(
        several, bootstrap([[tables[p][None]] for p in several], np.positive, confidence), strict=True
    ):
        found[place] = _around(ends, float(tables[place].mean()), tables[place].shape[1])
    return found


@lru_cache(maxsize=100_000)  # the same few counts come back for every relation of every run
def proportion(right: int, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """``right`` of ``n`` with Wilson's interval."""
    low, high = proportion_confint(right, n, alpha=1 - confidence, method="wilson")
    # By Wilson's formula, the interval ends at 0 if none is right and at 1 if all are, but for rounding in its sums.
    return Estimate(right / n, float(low) if right else 0.0, float(high) if right < n else 1.0, n)


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> float:
    """Exact McNemar test on the same items: the p-value of a split of the flips at least as uneven.

    Args:
        before, after: ``[items]`` whether each was right.
    """
    flips = [[0, (before & ~after).sum()], [(~before & after).sum(), 0]]
    return float(contingency_tables.mcnemar(flips, exact=True).pvalue)


def drop(dense: NDArray[np.bool_], compressed: NDArray[np.bool_]) -> Estimate:
    """Relative drop in accuracy, in % of the dense accuracy, as the first paper plots it.

    Args:
        dense, compressed: ``[items]`` or ``[seeds, items]`` whether each was right, the same items in the same order.

    Returns:
        The drop with a paired bootstrap interval over items (and seeds). Its p-value is McNemar's exact one, or the
        bootstrap's if there are several seeds. If no item differs, the interval is that of the share that could differ.
        nan if the dense model has no item right, or if there is only one item.
    """
    return drops([(dense, compressed)])[0]


Pair = tuple[NDArray[np.bool_], NDArray[np.bool_]]


def drops(pairs: Sequence[Pair]) -> list[Estimate]:
    """:func:`drop` of each pair of dense and compressed."""
    return mean_drops([[pair] for pair in pairs])


def mean_drops(by_set: Sequence[Sequence[Pair]]) -> list[Estimate]:
    """For each figure, the mean over data sets of :func:`drop`, as the first paper averages it.

    Args:
        by_set: for each figure, the pair of every data set, with the same seeds in all. Sets in which the dense model
        has no item right have no drop and are left out.
    """
    found = []
    able: dict[int, list[NDArray[np.bool_]]] = {}
    for place, pairs in enumerate(by_set):
        sets = [np.stack([np.atleast_2d(dense), np.atleast_2d(compressed)]) for dense, compressed in pairs]
        n = sum(both.shape[-1] for both in sets)
        known = [both for both in sets if both[0].any()]
        value = np.mean([_relative_drop(*both.mean((1, 2))) for both in known]) if known else np.nan
        found.append(Estimate(float(value), np.nan, np.nan, n))
        if known and all((before == after).all() for before, after in known):
            could = float(np.mean([100 * _could_differ(before.shape[1]) / before.mean() for before, _ in known]))
            found[place] = Estimate(0.0, -could, could, n, 1.0)
        elif known and min(both.shape[-1] for both in known) > 1:
            able[place] = known
    for (place, known), ends in zip(able.items(), bootstrap(list(able.values()), _relative_drop), strict=True):
        before, after = known[0]
        p = mcnemar(before[0], after[0]) if len(known) == len(before) == 1 else ends.p
        found[place] = replace(_around(ends, found[place].value, found[place].n), p=p)
    return found


def mean_difference(per_item: NDArray[np.float64]) -> Estimate:
    """Mean of a paired difference, with a bootstrap interval over items and a sign-flip permutation test against zero.

    Args:
        per_item: ``[items]`` one difference each, e.g. accuracy under one target minus under another, averaged over
            the sparsities that both were run at; or ``[seeds, items]``, where seeds are resampled too and the p-value
            is the bootstrap's.

    Returns:
        If no item differs, the interval is that of the share that could, by 1 each. nan if there is only one item.
    """
    return mean_differences([per_item])[0]


def mean_differences(per_item: Sequence[NDArray[np.float64]]) -> list[Estimate]:
    """:func:`mean_difference` of each."""
    tables = [np.atleast_2d(one) for one in per_item]
    found = [Estimate(float(table.mean()), np.nan, np.nan, table.shape[1], 1.0) for table in tables]
    for place, table in enumerate(tables):
        if not table.any():
            could = _could_differ(table.shape[1])
            found[place] = Estimate(0.0, -could, could, table.shape[1], 1.0)
    able = [place for place, table in enumerate(tables) if table.any() and table.shape[1] > 1]
    for place, ends in zip(able, bootstrap([[tables[p][None]] for p in able]), strict=True):
        p = sign_flips(tables[place][0]) if len(tables[place]) == 1 else ends.p
        found[place] = replace(_around(ends, found[place].value, found[place].n), p=p)
    return found


def difference_of_means(one: NDArray[np.float64], other: NDArray[np.float64]) -> Estimate:
    """Mean of one sample minus that of an independent other, such as timings, by Welch's t-test.

    Returns:
        The difference with its interval and p-value; nan and 1 if either sample has fewer than two values.
    """
    n, value = min(len(one), len(other)), float(one.mean() - other.mean())
    if n < 2:
        return Estimate(value, np.nan, np.nan, n, 1.0)
    test = stats.ttest_ind(one, other, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return Estimate(value, float(low), float(high), n, float(test.pvalue))


def mean(values: NDArray[np.float64], of_mean: Callable[..., Any] | None = None) -> Estimate:
    """A mean over items, such as windows of text, with a bootstrap interval.

    Args:
        values: ``[items]``.
        of_mean: applied to the mean, e.g. ``np.exp`` for the perplexity of mean negative log-likelihoods.
    """
    return means([values], of_mean)[0]


def means(values: Sequence[NDArray[np.float64]], of_mean: Callable[..., Any] | None = None) -> list[Estimate]:
    """:func:`mean` of each."""
    of_mean = of_mean or np.positive
    found = [Estimate(float(of_mean(one.mean())), np.nan, np.nan, len(one)) for one in values]
    able = [place for place, one in enumerate(values) if len(one) > 1]
    for place, ends in zip(able, bootstrap([[values[p][None, None]] for p in able], of_mean), strict=True):
        found[place] = _around(ends, found[place].value, found[place].n)
    return found


def medians(values: Sequence[NDArray[np.float64]]) -> list[Estimate]:
    """The median of each, e.g. of a timing's repeats ``[repeats]``, with a bootstrap interval."""
    found = []
    for one in values:
        low = high = np.nan
        if len(one) > 1:
            low, high = stats.bootstrap(
                [one],
                np.median,
                n_resamples=RESAMPLES_OF_ONE_SEED,
                confidence_level=CONFIDENCE,
                method="percentile",
                rng=np.random.default_rng(SEED),
            ).confidence_interval
        found.append(Estimate(float(np.median(one)), float(low), float(high), len(one)))
    return found


def mean_t(values: NDArray[np.float64]) -> Estimate | None:
    """A mean of many different values, e.g. log-probabilities, with Student's interval; None for fewer than two."""
    if len(values) < 2:
        return None
    low, high = DescrStatsW(values).tconfint_mean(1 - CONFIDENCE)
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def macro_accuracy(correct: Sequence[NDArray[np.bool_]]) -> Estimate:
    """Mean of the accuracies of several tasks, with a bootstrap interval over the items of each, and over seeds.

    Args:
        correct: for each task ``[items]`` or ``[seeds, items]``, with the same seeds in all.

    Returns:
        The mean; without an interval (nan) if a task has only one item, which does not show how items vary.
    """
    return macro_accuracies([correct])[0]


def macro_accuracies(correct: Sequence[Sequence[NDArray[np.bool_]]]) -> list[Estimate]:
    """:func:`macro_accuracy` of each."""
    figures = [[np.atleast_2d(task)[None] for task in tasks] for tasks in correct]
    found = []
    for tasks, ends in zip(figures, bootstrap(figures), strict=True):
        sizes = [task.shape[-1] for task in tasks]
        estimate = _around(ends, float(np.mean([task.mean() for task in tasks])), sum(sizes))
        found.append(estimate if min(sizes) > 1 else replace(estimate, low=np.nan, high=np.nan))
    return found


def corrected(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979) over several comparisons, in order.

    Done here because statsmodels collects the garbage of the whole process at each correction, which takes up to a
    second beside torch (``findings/statsmodels_holm_collects_garbage.sh``).
    """
    order = np.argsort(p_values)
    raised = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    found = np.empty(len(order))
    found[order] = np.maximum.accumulate(raised).clip(max=1)
    return found.tolist()


def _could_differ(n: int) -> float:
    """The upper bound on the share of items that differ when none of ``n`` did, which resampling would not show."""
    return proportion(0, n).high


def _relative_drop(reference: NDArray[np.float64], kept: NDArray[np.float64]) -> NDArray[np.float64]:
    share: NDArray[np.float64] = 100 * (reference - kept) / np.where(reference > 0, reference, np.nan)
    return share


def _around(ends: Ends, value: float, n: int) -> Estimate:
    """The figure with these ends; if all resamples are equal, ends that miss it by rounding are set to it."""
    low, high = (value if math.isclose(end, value, rel_tol=1e-12) else end for end in (ends.low, ends.high))
    return Estimate(value, low, high, n)
