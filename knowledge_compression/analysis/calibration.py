"""Whether confidence still means something: calibration error, Brier score and conformal sets, dense and compressed.

Confidence is the share of an answer among those it is ranked with (``evaluation/confidence.py``). The calibration error
is that of Guo et al. (2017), over fifteen bins of equal width; the Brier score is the multi-class one, from 0 to 2.
Conformal sets are those of split conformal prediction (Sadinle et al., 2019). The right answers' shares on one half of
the items set a threshold. For an item of the other half, the set holds the answers whose share reaches the threshold;
it contains the right one with 90 % probability. Halves are drawn twenty times, the same ones for every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
import polars as pl
from numpy.typing import NDArray

from knowledge_compression.analysis.comparisons import KEY, Group, items_of
from knowledge_compression.resampling import CONFIDENCE, RESAMPLES_OF_ONE_SEED, SEED
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, means

BINS = 15
COVERAGE = 0.9  # asked of conformal sets
HALVES = 20
FEWEST = 40  # items of a group; half of them set a threshold
_AT_A_TIME = 64  # resamples, which keeps their draws small


@dataclass(frozen=True)
class Sure:
    """A run's confidence in the items of a group.

    Attributes:
        right: whether each item is answered right, ``[items]``.
        shares: shares of each item's answers, largest first, padded with -1: ``[items, answers]``.
        gold: share of the right answer, ``[items]``.
        brier: Brier score of each item, ``[items]``.
    """

    right: NDArray[np.bool_]
    shares: NDArray[np.float64]
    gold: NDArray[np.float64]
    brier: NDArray[np.float64]

    @cached_property
    def gaps(self) -> NDArray[np.float64]:
        """Confidence minus correctness of each item in the column of its bin: ``[items, bins]``."""
        confidence = self.shares[:, 0]
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        found = np.zeros((len(bins), BINS))
        found[np.arange(len(bins)), bins] = confidence - self.right
        return found

    def threshold(self, items: NDArray[np.bool_]) -> float:
        """The smallest share with which an answer belongs to a set, from the right answers of some items.

        It is the k-th smallest of n shares with k = floor((n + 1) (1 - coverage)), or zero if k is 0. The right answer
        of a new item reaches it with probability :data:`COVERAGE` or more.
        """
        shares = np.sort(self.gold[items])
        place = len(shares) + 1 - ceil((len(shares) + 1) * COVERAGE - 1e-9)
        return float(shares[place - 1]) if place else 0.0

    def sizes(self, threshold: float) -> NDArray[np.int64]:
        """Number of answers in the set of each item, at most the number of answers that were kept."""
        return (self.shares >= np.float32(threshold)).sum(1)

    def covered(self, threshold: float) -> NDArray[np.bool_]:
        """Whether the set of each item holds the right answer."""
        return self.gold >= threshold


@dataclass(frozen=True)
class Calibrated:
    """One run of a group, compared with its baseline.

    Attributes:
        run: the run; with several seeds, that of the lowest.
        answers: number of answers an item is ranked with, on average.
        error, brier, size: calibration error, mean Brier score, and mean size of a conformal set.
        coverage: share of conformal sets that hold the right answer.
        coverage_of_dense: the same with the dense model's threshold.
        error_change, brier_change, size_change: this run's minus the dense model's, paired by item; None for the dense
            run itself.
    """

    run: Run
    answers: float
    error: Estimate
    brier: Estimate
    size: Estimate
    coverage: Estimate
    coverage_of_dense: Estimate
    error_change: Estimate | None
    brier_change: Estimate | None
    size_change: Estimate | None


def calibrated(group: Group) -> list[Calibrated]:
    """Every setting of a group, the dense one first; empty if the baseline lacks confidence or has too few items."""
    found = [(run, sure) for run in group.settings if (sure := sure_of(group, run)) is not None]
    if not found or found[0][0] is not group.dense or len(found[0][1].right) < FEWEST:
        return []
    dense = found[0][1]
    halves = _halves(len(dense.right))
    limits = [dense.threshold(half) for half in halves]
    choices = items_of(group.dense, group.asked.suite).select(pl.col("choices").mean()).collect()["choices"].item()
    before = _of_items(dense, halves, limits, limits)
    told = []
    for (run, sure), error, change in zip(found, *errors([sure for _, sure in found]), strict=True):
        after = _of_items(sure, halves, [sure.threshold(half) for half in halves], limits)
        brier, size, coverage, of_dense = means([sure.brier, *after])
        changes: tuple[Estimate | None, ...] = (None, None, None)
        if sure is not dense:
            changes = (change, *means([sure.brier - dense.brier, after[0] - before[0]]))
        told.append(Calibrated(run, float(choices), error, brier, size, coverage, of_dense, *changes))
    return told


def sure_of(group: Group, run: Run) -> Sure | None:
    """A run's confidence in the items of a group, in their order; None if it was not recorded for all of them."""
    items = items_of(run, group.asked.suite)
    names = ["correct", "shares", "gold_share", "brier"]
    if not {*names} <= {*items.collect_schema()}:
        return None
    there = group.items.join(items.select(*KEY, *names).collect(), on=KEY, how="left", maintain_order="left")
    if there["gold_share"].null_count() or there["shares"].null_count() or there["correct"].null_count():
        return None
    lengths = there["shares"].list.len().to_numpy()
    shares = np.full((there.height, int(lengths.max())), -1.0)
    shares[np.arange(shares.shape[1]) < lengths[:, None]] = there["shares"].explode().to_numpy()
    return Sure(there["correct"].to_numpy(), shares, there["gold_share"].to_numpy(), there["brier"].to_numpy())


def errors(sures: Sequence[Sure]) -> tuple[list[Estimate], list[Estimate]]:
    """The calibration errors of several runs, and their changes from the first, with percentile bootstrap intervals.

    All runs share the resampled items, so changes are paired. An error is a sum of absolute values and so is never 0
    by chance: with few items its interval lies above 0 even for a calibrated model.
    """
    n = len(sures[0].right)
    gaps = np.concatenate([sure.gaps for sure in sures], axis=1)
    values = _errors(gaps, np.ones((1, n)))
    resampled = np.concatenate([_errors(gaps, weights) for weights in _draws(n)])
    changes = resampled - resampled[:, :1]
    found, changed = [], []
    for i, value in enumerate(values[0]):
        low, high, _ = _ends(resampled[:, i])
        found.append(Estimate(float(value), low, high, n))
        changed.append(Estimate(float(value - values[0, 0]), *_ends(changes[:, i])[:2], n, _ends(changes[:, i])[2]))
    return found, changed


def _of_items(
    sure: Sure, halves: NDArray[np.bool_], own: list[float], others: list[float]
) -> list[NDArray[np.float64]]:
    """Size and coverage of each item by the run's own thresholds, and coverage by another run's; means over halves."""
    tested = (~halves).sum(0)
    pairs = list(zip(~halves, own, others, strict=True))
    sizes = sum(test * sure.sizes(limit) for test, limit, _ in pairs) / tested
    covered = sum(test * sure.covered(limit) for test, limit, _ in pairs) / tested
    of_others = sum(test * sure.covered(limit) for test, _, limit in pairs) / tested
    return [sizes, covered, of_others]


def _halves(n: int) -> NDArray[np.bool_]:
    """The items that set a threshold; each item is in every other half: ``[HALVES, n]``."""
    rng = np.random.default_rng(SEED)
    halves = np.zeros((HALVES, n), bool)
    for pair in halves.reshape(HALVES // 2, 2, n):
        pair[0, rng.permutation(n)[: n // 2]] = True
        pair[1] = ~pair[0]
    return halves


def _draws(n: int) -> Iterator[NDArray[np.float64]]:
    """How often each item is drawn in each resample, a few resamples at a time: ``[resamples, n]``."""
    rng = np.random.default_rng(SEED)
    for start in range(0, RESAMPLES_OF_ONE_SEED, _AT_A_TIME):
        drawn = rng.integers(n, size=(min(_AT_A_TIME, RESAMPLES_OF_ONE_SEED - start), n))
        yield np.stack([np.bincount(row, minlength=n) for row in drawn]).astype(np.float64)


def _errors(gaps: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The calibration error of each run under each weighting of the items, ``[weightings, runs]``.

    Args:
        gaps: the gaps of all runs in one matrix, ``[items, runs * bins]``.
        weights: ``[weightings, items]``.
    """
    of_bins = np.abs(weights @ gaps).reshape(len(weights), -1, BINS)
    errors: NDArray[np.float64] = of_bins.sum(2) / len(gaps)
    return errors


def _ends(resampled: NDArray[np.float64]) -> tuple[float, float, float]:
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    beyond = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return float(low), float(high), float(min(1.0, 2 * (1 + beyond) / (1 + len(resampled))))
