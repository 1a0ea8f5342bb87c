"""Paired tests and intervals on items; scipy and statsmodels do the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

CONFIDENCE = 0.95
RESAMPLES = 2000
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


def accuracy(correct: NDArray[np.bool_]) -> Estimate:
    """Share of items answered right, with Wilson's interval.

    Args:
        correct: ``[items]``.
    """
    n = len(correct)
    right = int(correct.sum())
    low, high = proportion_confint(right, n, alpha=1 - CONFIDENCE, method="wilson")
    return Estimate(right / n, float(low), float(high), n)


def mcnemar(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> float:
    """Exact McNemar test on the same items: p-value of as uneven a split of the flips by chance.

    Args:
        before, after: ``[items]`` whether each was right.
    """
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    return float(stats.binomtest(lost, lost + gained, 0.5).pvalue) if lost + gained else 1.0


def drop(dense: NDArray[np.bool_], compressed: NDArray[np.bool_]) -> Estimate:
    """Relative drop in accuracy, in % of the dense accuracy, as the first paper plots it.

    Args:
        dense, compressed: ``[items]`` whether each was right, the same items in the same order.

    Returns:
        The drop with a paired bootstrap interval over items and McNemar's exact p-value; nan where the dense model
        knows nothing or there is one item.
    """
    n = len(dense)
    if not dense.any() or n < 2:  # nothing to lose, or nothing to resample
        return Estimate(float("nan"), float("nan"), float("nan"), n)

    def relative(before: NDArray[np.float64], after: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        reference = before.mean(axis=axis)
        share: NDArray[np.float64] = (
            100 * (reference - after.mean(axis=axis)) / np.where(reference > 0, reference, np.nan)
        )
        return share

    answers = dense.astype(float), compressed.astype(float)
    low, high = _bootstrap(answers, relative)
    return Estimate(float(relative(*answers)), low, high, n, mcnemar(dense, compressed))


def mean_difference(per_item: NDArray[np.float64]) -> Estimate:
    """Mean of a paired difference, with a bootstrap interval over items and a sign-flip permutation test against zero.

    Args:
        per_item: ``[items]`` one difference each, e.g. accuracy under one target minus under another, averaged over
            the sparsities that both were run at.
    """
    mean, n = float(per_item.mean()), len(per_item)
    if not per_item.any() or n < 2:
        return Estimate(mean, mean, mean, n, 1.0)
    low, high = _bootstrap((per_item,), lambda d, axis=-1: d.mean(axis=axis))
    test = stats.permutation_test(
        (per_item,),
        lambda d, axis=-1: d.mean(axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=_batch(n),
        vectorized=True,
        rng=np.random.default_rng(_SEED),
    )
    return Estimate(mean, low, high, n, float(test.pvalue))


def corrected(p_values: Sequence[float]) -> list[float]:
    """Holm's correction over several comparisons, in their order."""
    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def _bootstrap(samples: tuple[NDArray[np.float64], ...], statistic: object) -> tuple[float, float]:
    interval = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=_batch(len(samples[0])),
        method="percentile",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _batch(items: int) -> int:
    """Resamples drawn at once, so that a batch stays below about 50 MB."""
    return max(1, min(RESAMPLES, 6_000_000 // max(items, 1)))
