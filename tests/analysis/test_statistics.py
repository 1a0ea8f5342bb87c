"""Tests and intervals against scipy, plain loops and their formulas."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from knowledge_compression import statistics


def test_mcnemar_is_the_exact_binomial_test_on_flips():
    rng = np.random.default_rng(1)
    before, after = rng.random(200) < 0.7, rng.random(200) < 0.5
    table = pl.DataFrame({"b": before, "a": after})
    lost = table.filter(pl.col("b") & ~pl.col("a")).height
    gained = table.filter(~pl.col("b") & pl.col("a")).height
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue
    assert statistics.mcnemar(before, after) == pytest.approx(expected)
    assert statistics.mcnemar(before, before) == 1.0


def test_drop_is_relative_to_dense_and_its_interval_covers():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(40):
        dense = rng.random(300) < 0.8
        after = dense & (rng.random(300) < 0.75)  # a quarter of what was known is lost
        estimate = statistics.drop(dense, after)
        assert estimate.value == pytest.approx(100 * (dense.mean() - after.mean()) / dense.mean())
        covered += estimate.low <= 25 <= estimate.high
    assert covered >= 34  # 95 % nominal
    assert np.isnan(statistics.drop(np.zeros(5, bool), np.zeros(5, bool)).value)


def test_wilsons_interval_holds_its_share_and_ends_where_the_formula_says():
    for n in range(1, 400):
        none, every = statistics.proportion(0, n), statistics.proportion(n, n)
        assert none.low == none.value == 0 and every.high == every.value == 1
        assert none.high == pytest.approx(1 - every.low)
        for right in {1, n // 2, n - 1}:
            some = statistics.proportion(right, n)
            assert 0 <= some.low <= some.value <= some.high <= 1


def test_an_interval_of_resamples_that_are_all_alike_is_the_figure_itself():
    for n in range(2, 60):
        same = statistics.mean(np.full(n, 0.1))
        assert same.low == same.value == same.high


def test_accuracy_interval_is_wilsons():
    correct = np.arange(50) < 20
    interval = stats.binomtest(20, 50).proportion_ci(method="wilson")
    estimate = statistics.accuracy(correct)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))


@settings(max_examples=5)  # each of statsmodels collects the garbage of the whole process
@given(st.lists(st.floats(0, 1) | st.sampled_from([0.01, 0.03]), max_size=12))
def test_holm_is_statsmodels(p):
    assert statistics.corrected(p) == (multipletests(p, method="holm")[1].tolist() if p else [])


def test_intervals_and_permutations_are_scipys_on_the_items_themselves():
    rng = np.random.default_rng(7)
    before = rng.random(300) < 0.8
    after = before & (rng.random(300) < 0.9) | (rng.random(300) < 0.05)
    difference = after.astype(float) - before
    ours = statistics.mean_difference(difference)
    theirs = stats.bootstrap((difference,), np.mean, n_resamples=5000, method="percentile", rng=rng).confidence_interval
    p = stats.permutation_test(
        (difference,),
        lambda d, axis: d.mean(axis),
        permutation_type="samples",
        n_resamples=5000,
        vectorized=True,
        rng=rng,
    ).pvalue
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.008)
    assert ours.p == pytest.approx(p, abs=0.01)

    def relative(dense, kept, axis):
        return 100 * (dense.mean(axis) - kept.mean(axis)) / dense.mean(axis)

    fall = statistics.drop(before, after)
    theirs = stats.bootstrap(
        (before.astype(float), after.astype(float)),
        relative,
        paired=True,
        n_resamples=5000,
        method="percentile",
        rng=rng,
    ).confidence_interval
    assert (fall.low, fall.high) == pytest.approx((theirs.low, theirs.high), abs=0.6)


def test_items_and_seeds_are_resampled_as_a_plain_loop_does_it():
    rng = np.random.default_rng(9)
    dense = np.tile(rng.random(60) < 0.9, (4, 1))
    after = dense & (rng.random((4, 60)) < np.array([[0.5], [0.6], [0.7], [0.9]]))
    falls = []
    for _ in range(4000):
        seeds, items = rng.integers(0, 4, 4), rng.integers(0, 60, 60)
        before, kept = (answers[np.ix_(seeds, items)].mean() for answers in (dense, after))
        falls.append(100 * (before - kept) / before)
    fall = statistics.drop(dense, after)
    assert (fall.low, fall.high) == pytest.approx(np.quantile(falls, [0.025, 0.975]), abs=1.5)
    assert fall.p == pytest.approx(2 / 10_000)  # none of 9,999 resamples was without a drop


def test_many_at_once_are_as_one_by_one():
    rng = np.random.default_rng(10)
    pairs = [tuple(rng.random((2, n)) < 0.7) for n in (50, 80, 50)] + [(np.zeros(50, bool), np.ones(50, bool))]
    assert [str(one) for one in statistics.drops(pairs)] == [str(statistics.drop(*pair)) for pair in pairs]
    tasks = [[rng.random(n) < 0.5 for n in sizes] for sizes in ((30, 1), (20, 40), (30, 1))]  # one of a single item
    assert list(map(str, statistics.macro_accuracies(tasks))) == [str(statistics.macro_accuracy(one)) for one in tasks]


def test_the_mean_over_tasks_weighs_them_alike_and_its_interval_is_that_of_their_sum_of_variances():
    tasks = [np.arange(400) < 100, np.arange(100) < 80]
    estimate = statistics.macro_accuracy(tasks)
    assert estimate.value == pytest.approx((0.25 + 0.8) / 2)
    error = np.sqrt(0.25 * 0.75 / 400 + 0.8 * 0.2 / 100) / 2
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.1)
