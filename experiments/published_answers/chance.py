"""Which flips meet by chance, and what a changed answer depends on: permutations, intervals, a regression."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import statsmodels.api as sm
from answers import BENCHMARKS, MODELS, Answers
from numpy.typing import NDArray

from knowledge_compression.statistics import Estimate

TWENTIETHS = 20  # parts of the confidence within which flips are permuted
PERMUTATIONS, RESAMPLES = 1999, 1999


@dataclass(frozen=True)
class Overlap:
    """In how many models at once items flip, and in how many they would by chance.

    Attributes:
        items: by number of models, 0 to 5, how many items flip in so many.
        chance: the same, mean over permutations of each model's flips among the items of a benchmark.
        unsure: the same among items of the same twentieth of the model's own confidence.
        together: how many pairs of models flip an item together.
        pairs: the same for each of the two kinds of permutation: the mean, the middle 95 %, and the two-sided p-value
            of what is observed.
    """

    items: NDArray[np.int64]
    chance: NDArray[np.float64]
    unsure: NDArray[np.float64]
    together: int
    pairs: tuple[Estimate, Estimate]


def overlap(answers: Answers, flips: NDArray[np.bool_]) -> Overlap:
    """The permutation tests: do flips meet more often than by chance, and than shared unsureness explains?

    Args:
        answers: of all models.
        flips: ``[models, items]`` what counts as a flip.
    """
    task = np.unique(answers.task, return_inverse=True)[1]
    benchmarks = np.broadcast_to(task, flips.shape)
    observed = np.bincount(flips.sum(0), minlength=len(flips) + 1)
    met = int(observed @ PAIRS)
    means, pairs = [], []
    for strata in (benchmarks, benchmarks * TWENTIETHS + answers.part(TWENTIETHS)):
        counts = np.array(list(permuted(flips, strata)))
        together = counts @ PAIRS
        low, high = np.quantile(together, [0.025, 0.975])
        tail = min((together >= met).sum(), (together <= met).sum())
        p = min(1.0, 2 * (1 + tail) / (1 + PERMUTATIONS))
        pairs.append(Estimate(float(together.mean()), float(low), float(high), int(flips.sum()), float(p)))
        means.append(counts.mean(0))
    return Overlap(observed, *means, met, (pairs[0], pairs[1]))


PAIRS = np.array([k * (k - 1) // 2 for k in range(len(MODELS) + 1)])


def permuted(flips: NDArray[np.bool_], strata: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """How many items flip in 0, 1, ... models when each model's flips are permuted within its strata."""
    rng = np.random.default_rng(0)
    sorted_places = [np.argsort(row, kind="stable") for row in strata]
    dealt = np.empty_like(flips)
    for _ in range(PERMUTATIONS):
        for model, places in enumerate(sorted_places):
            order = np.lexsort((rng.random(len(places)), strata[model]))  # shuffled within each stratum
            dealt[model, places] = flips[model, order]
        yield np.bincount(dealt.sum(0), minlength=len(flips) + 1)


def resampled(of_item: NDArray[np.float64], answers: Answers) -> tuple[float, float]:
    """The 95 % interval of a ratio of sums over items, items redrawn within their benchmarks.

    Args:
        of_item: ``[2, items]``, numerator and denominator of each item over all models.
    """
    rng = np.random.default_rng(0)
    sums = np.zeros((RESAMPLES, 2))
    for task in BENCHMARKS:
        part = of_item[:, answers.task == task]
        draws = rng.multinomial(part.shape[1], np.full(part.shape[1], 1 / part.shape[1]), size=RESAMPLES)
        sums += draws @ part.T
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(low), float(high)


def ratio(top: NDArray[Any], bottom: NDArray[Any], answers: Answers) -> Estimate:
    """A share over all models, ``[models, items]`` counted, with an interval over items."""
    of_item = np.stack([top.sum(0), bottom.sum(0)]).astype(float)
    low, high = resampled(of_item, answers)
    return Estimate(float(top.sum() / bottom.sum()), low, high, int(bottom.sum()))


def odds(answers: Answers, precision: str) -> dict[str, Estimate]:
    """How the odds of another answer change with confidence and with hardness, each with the other held fixed.

    A logistic regression over all models with one level for each model and benchmark; standard errors by item.

    Returns:
        Odds ratios: for one standard deviation more of (logit) confidence, and for one more model that is wrong.
    """
    models, items = answers.sure.shape
    clipped = np.clip(answers.sure, 0.2501, 1 - 1e-4)
    logit = np.log(clipped / (1 - clipped)).ravel()
    task = np.unique(answers.task, return_inverse=True)[1]
    level = (np.arange(models)[:, None] * len(BENCHMARKS) + task).ravel()
    columns = [(logit - logit.mean()) / logit.std(), answers.others_wrong.ravel()]
    design = np.column_stack([*columns, np.eye(models * len(BENCHMARKS))[level]])
    groups = np.tile(np.arange(items), models)
    fit = sm.Logit(answers.changed[precision].ravel().astype(float), design).fit(
        disp=0, cov_type="cluster", cov_kwds={"groups": groups}
    )
    ends = fit.conf_int()
    return {
        name: Estimate(*map(float, np.exp([fit.params[i], *ends[i]])), items, float(fit.pvalues[i]))
        for i, name in enumerate(("confidence", "hardness"))
    }
