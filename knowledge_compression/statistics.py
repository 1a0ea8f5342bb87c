"""Paired tests and intervals on items, pooled over seeds; scipy and statsmodels do the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

CONFIDENCE = 0.95
RESAMPLES = 10_000  # of a bootstrap
FLIPS = 100_000  # of a permutation test: what is corrected for a hundred comparisons must still be able to be small
_SEED = 0  # resampling is part of the analysis, not of a run: the same store gives the same intervals


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval and, where it is a difference, the probability of one as large by chance.

    Attributes:
        value, low, high: the figure and its 95 % confidence interval.
        p: two-sided p-value against zero; None for a figure that is no difference.
        n: number of items it rests on.
    """

    value: float
    low: float
    high: float
    n: int
    p: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def through(self, rising: Callable[[float], float]) -> Estimate:
        """What a rising function makes of the figure and of both ends of its interval."""
        return replace(self, value=rising(self.value), low=rising(self.low), high=rising(self.high))


def accuracy(correct: NDArray[np.bool_], confidence: float = CONFIDENCE) -> Estimate:
    """Share of items answered right: Wilson's interval, or a bootstrap over items and seeds where there are several.

    Args:
        correct: ``[items]`` or ``[seeds, items]``.
        confidence: of the two-sided interval.
    """
    by_seed = np.atleast_2d(correct)
    seeds, n = by_seed.shape
    if seeds > 1:
        low, high = _interval(_resampled((by_seed,), _SEED)[:, 0], confidence)
        return Estimate(float(by_seed.mean()), low, high, n)
    return proportion(int(by_seed.sum()), n, confidence)


def proportion(right: int, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """``right`` of ``n`` with Wilson's interval."""
    low, high = proportion_confint(right, n, alpha=1 - confidence, method="wilson")
    return Estimate(right / n, float(low), float(high), n)


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> float:
    """Exact McNemar test on the same items: p-value of as uneven a split of the flips by chance.

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
        The drop with a paired bootstrap interval over items (and seeds); its p-value is McNemar's exact one, or the
        bootstrap's where there are several seeds. nan where the dense model knows nothing or there is one item.
    """
    before, after = np.atleast_2d(dense), np.atleast_2d(compressed)
    seeds, n = before.shape
    if not before.any() or n < 2:  # nothing to lose, or nothing to resample
        return Estimate(float("nan"), float("nan"), float("nan"), n)

    def relative(reference: NDArray[np.float64], kept: NDArray[np.float64]) -> NDArray[np.float64]:
        share: NDArray[np.float64] = 100 * (reference - kept) / np.where(reference > 0, reference, np.nan)
        return share

    low, high, p = _bootstrap((before, after), relative)
    if seeds == 1:
        p = mcnemar(before[0], after[0])
    return Estimate(float(relative(before.mean(), after.mean())), low, high, n, p)


def mean_difference(per_item: NDArray[np.float64]) -> Estimate:
    """Mean of a paired difference, with a bootstrap interval over items and a sign-flip permutation test against zero.

    Args:
        per_item: ``[items]`` one difference each, e.g. accuracy under one target minus under another, averaged over
            the sparsities that both were run at; or ``[seeds, items]``, where seeds are resampled too and the p-value
            is the bootstrap's.
    """
    by_seed = np.atleast_2d(per_item)
    mean, (seeds, n) = float(by_seed.mean()), by_seed.shape
    if not by_seed.any() or n < 2:
        return Estimate(mean, mean, mean, n, 1.0)
    low, high, p = _bootstrap((by_seed,), lambda mean: mean)
    return Estimate(mean, low, high, n, _sign_flips(by_seed[0]) if seeds == 1 else p)


def mean(values: NDArray[np.float64], of_mean: Callable[..., Any] = lambda mean: mean) -> Estimate:
    """A mean over items, such as windows of text, with a bootstrap interval.

    Args:
        values: ``[items]``.
        of_mean: what is wanted of the mean, e.g. ``np.exp`` for the perplexity of mean negative log-likelihoods.
    """
    if len(values) < 2:
        only = float(of_mean(values.mean()))
        return Estimate(only, float("nan"), float("nan"), len(values))
    low, high, _ = _bootstrap((values[None],), of_mean)
    return Estimate(float(of_mean(values.mean())), low, high, len(values))


def mean_t(values: NDArray[np.float64]) -> Estimate | None:
    """A mean of many different values, such as log-probabilities, with Student's interval; None of fewer than two."""
    if len(values) < 2:
        return None
    low, high = DescrStatsW(values).tconfint_mean(1 - CONFIDENCE)
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def macro_accuracy(correct: Sequence[NDArray[np.bool_]]) -> Estimate:
    """Mean of the accuracies of several tasks, with a bootstrap interval over the items of each.

    Args:
        correct: for each task ``[items]`` or ``[seeds, items]``, with as many seeds in all.
    """
    tasks = [np.atleast_2d(task) for task in correct]
    value = float(np.mean([task.mean() for task in tasks]))
    means = np.mean([_resampled((task,), seed)[:, 0] for seed, task in enumerate(tasks)], axis=0)
    low, high = _interval(means)
    return Estimate(value, low, high, sum(task.shape[1] for task in tasks))


def corrected(p_values: Sequence[float]) -> list[float]:
    """Holm's correction over several comparisons, in their order."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def _bootstrap(
    samples: tuple[NDArray[Any], ...], statistic: Callable[..., NDArray[np.float64]]
) -> tuple[float, float, float]:
    """Resample items and, where there are several, seeds, independently of each other and alike in all samples.

    Items and seeds are crossed (every seed answers every item), so both are drawn anew in each resample (Owen, 2007,
    "The pigeonhole bootstrap"), which errs on the wide side. Drawing n of n items with replacement is a multinomial
    draw of how often each *kind* of item comes, and right and wrong answers come in few kinds: so a resample of 100,000
    items costs no more than one of a hundred. ``scipy.stats.bootstrap`` draws the items themselves, and one factor at a
    time: the same 10,000 resamples of a paired drop take it 36 times as long for 1,200 items, and for 100,000 it is 148
    times and 13 s a figure (``benchmarks/bootstrap.py``). It gives the same intervals (``tests/test_analysis.py``).

    Args:
        samples: ``[seeds, items]`` each.
        statistic: of the means of the samples, elementwise.

    Returns:
        The ends of the percentile interval, and a two-sided p-value against zero.
    """
    values = statistic(*_resampled(samples, _SEED).T)
    return *_interval(values), _two_sided(values)


def _resampled(samples: tuple[NDArray[Any], ...], seed: int) -> NDArray[np.float64]:
    """Means of the samples in each resample: ``[resamples, samples]``."""
    seeds, items = samples[0].shape
    kinds, counts = np.unique(np.concatenate(samples), axis=1, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = []
    for size in _batches(RESAMPLES, len(counts)):
        means = stats.multinomial.rvs(items, counts / items, size=size, random_state=rng) @ kinds.T / items
        times = rng.multinomial(seeds, [1 / seeds] * seeds, size=size) / seeds
        drawn.append((means.reshape(size, len(samples), seeds) * times[:, None]).sum(-1))
    return np.concatenate(drawn)


def _interval(values: NDArray[np.float64], confidence: float = CONFIDENCE) -> tuple[float, float]:
    low, high = np.quantile(values[np.isfinite(values)], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _sign_flips(per_item: NDArray[np.float64]) -> float:
    """Two-sided p-value of a mean against zero where each difference could as well have the other sign.

    How many of the items with one size of difference turn out positive is binomial, so scipy's test draws kinds, not
    items.
    """
    sizes, kind, counts = np.unique(np.abs(per_item), return_inverse=True, return_counts=True)
    positive = np.bincount(kind, per_item > 0)
    rng = np.random.default_rng(_SEED)

    def total(positives: NDArray[Any], axis: int) -> NDArray[np.float64]:
        # What adds up in another order differs in the last digits, and would not count as equal.
        return np.round((2 * positives - counts) @ sizes, 9)

    flips = stats.monte_carlo_test(
        positive,
        lambda size: rng.binomial(counts, 0.5, size=size),
        total,
        vectorized=True,
        n_resamples=FLIPS,
        batch=max(_batches(FLIPS, len(counts))),
    )
    return float(flips.pvalue)


def _two_sided(values: NDArray[np.float64]) -> float:
    """Twice the smaller share of resamples on either side of zero, the data themselves counted as one of them."""
    tail = min((values <= 0).sum(), (values >= 0).sum())
    return float(min(1.0, 2 * (1 + tail) / (1 + len(values))))


def _batches(resamples: int, kinds: int) -> list[int]:
    """Sizes of the batches that resamples are drawn in, so that one stays below about 50 MB."""
    most = max(1, min(resamples, 6_000_000 // max(kinds, 1)))
    return [min(most, resamples - start) for start in range(0, resamples, most)]
