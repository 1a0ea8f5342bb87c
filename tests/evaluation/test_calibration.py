"""Calibration error, Brier score and conformal sets, by plain loops and on answers whose truth is drawn."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.experiments import SUITE
from helpers.stores import made_run
from knowledge_compression.analysis import calibration, markdown, tables
from knowledge_compression.analysis.calibration import Sure, calibrated, errors, sure_of
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.page import _sure, render
from knowledge_compression.evaluation.confidence import MOST, confidence
from knowledge_compression.evaluation.samples import answer_of
from knowledge_compression.evaluation.scoring import Scorer


@settings(max_examples=40)
@given(st.lists(st.floats(-30, 5), min_size=1, max_size=8), st.data())
def test_the_columns_of_an_item_by_plain_loops(scores, data):
    gold = data.draw(st.integers(0, len(scores) - 1))
    told = confidence(scores, gold)
    total = sum(np.exp(score) for score in scores)
    shares = [np.exp(score) / total for score in scores]
    brier = 0.0
    for i, share in enumerate(shares):
        brier += (share - (i == gold)) ** 2
    assert told["brier"] == pytest.approx(brier, abs=1e-9) and told["gold_share"] == pytest.approx(shares[gold])
    assert told["shares"] == pytest.approx(sorted(shares, reverse=True), rel=1e-5)
    assert len(confidence([0.0] * 500, 3)["shares"]) == MOST


def drawn(n: int, answers: int, sharpness: float = 1.0, seed: int = 0) -> Sure:
    """Items whose right answers are drawn by true probabilities; the model's are these to a power (1: calibrated)."""
    rng = np.random.default_rng(seed)
    truth = rng.dirichlet(np.full(answers, 0.4), size=n)
    gold = np.array([rng.choice(answers, p=p) for p in truth])
    said = truth**sharpness / (truth**sharpness).sum(1, keepdims=True)
    brier = ((said - np.eye(answers)[gold]) ** 2).sum(1)
    shares = -np.sort(-said, axis=1).astype(np.float32).astype(np.float64)
    return Sure(said.argmax(1) == gold, shares, said[np.arange(n), gold], brier)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(2, 6))
def test_the_calibration_error_is_that_of_a_plain_loop(seed, n, answers):
    sure = drawn(n, answers, 2.0, seed)
    value = 0.0
    for b in range(calibration.BINS):
        low, high = b / calibration.BINS, (b + 1) / calibration.BINS
        inside = [i for i in range(n) if low < sure.shares[i, 0] <= high + 1e-12]
        if inside:
            confident = sum(sure.shares[i, 0] for i in inside) / len(inside)
            right = sum(bool(sure.right[i]) for i in inside) / len(inside)
            value += len(inside) / n * abs(right - confident)
    found = errors([sure])[0][0]
    assert found.value == pytest.approx(value, abs=1e-9) and found.n == n


def test_calibrated_answers_have_little_error_and_overconfident_ones_more():
    calm, bold = drawn(2000, 5), drawn(2000, 5, 3.0)
    (little, much, same), (_, change, none) = errors([calm, bold, calm])
    assert little.value < 0.03 and much.low > 0.1 and same == little
    assert change.value == pytest.approx(much.value - little.value) and change.low > 0.1 and change.p < 0.01
    assert (none.value, none.low, none.high, none.p) == (0, 0, 0, 1)


def with_confidence(run, sure: Sure):
    shares = pl.Series([row[row >= 0].tolist() for row in sure.shares], dtype=pl.List(pl.Float32))
    run._items = run.items.with_columns(shares=shares, choices=pl.lit(sure.shares.shape[1], pl.Int64))
    run._items = run._items.with_columns(gold_share=pl.Series(sure.gold), brier=pl.Series(sure.brier))
    return run


def group_of(dense: Sure, other: Sure):
    runs = [made_run(dense.right, compression="none"), made_run(other.right)]
    comparisons = compare([with_confidence(run, sure) for run, sure in zip(runs, (dense, other), strict=True)])
    return comparisons


def test_conformal_sets_hold_the_right_answer_as_often_as_asked():
    calm, bold = drawn(3000, 8), drawn(3000, 8, 3.0)
    before, after = calibrated(group_of(calm, bold).groups[0])
    for one in (before, after):  # whatever a model's confidence, its own threshold makes it so
        assert 0.89 < one.coverage.value < 0.915 and one.coverage.n == 3000
    assert after.coverage_of_dense.high < 0.85 < before.coverage_of_dense.value
    assert before.size_change is None and before.answers == 8
    assert after.size_change.low <= after.size.value - before.size.value <= after.size_change.high
    assert after.brier_change.value == pytest.approx(bold.brier.mean() - calm.brier.mean())
    assert after.error_change.low > 0


def test_a_set_is_what_its_definition_says():
    sure = drawn(101, 6)
    half = np.arange(101) < 60
    shares = sorted(sure.gold[half], reverse=True)  # the 55th of 60: ceil(61 x 0.9)
    assert sure.threshold(half) == shares[54]
    assert sure.threshold(np.arange(101) < 5) == 0.0  # five items cannot promise 90 %: every answer belongs
    limit = sure.threshold(half)
    plain = [sum(share >= np.float32(limit) for share in row) for row in sure.shares]
    assert sure.sizes(limit).tolist() == plain
    assert (sure.covered(limit) == (sure.gold >= limit)).all() and sure.covered(limit)[half].sum() == 55


def test_runs_without_confidence_or_with_few_items_have_no_calibration():
    calm = drawn(60, 4)
    comparisons = group_of(calm, calm)
    assert len(calibrated(comparisons.groups[0])) == 2
    bare = compare([made_run(calm.right, compression="none"), made_run(calm.right)])
    assert calibrated(bare.groups[0]) == [] and tables.calibration_table(bare).rows == []
    few = drawn(20, 4)
    assert calibrated(group_of(few, few).groups[0]) == []


def test_tables_and_page_tell_calibration():
    comparisons = group_of(drawn(200, 4), drawn(200, 4, 3.0))
    dense, other = tables.calibration_table(comparisons).rows
    assert dense["error_change"] is None and other["error_change"].value > 0
    assert markdown.calibration(comparisons)[-1].count("[") == len(tables.CALIBRATION)
    assert _sure(comparisons.groups[0])[1]["size"][0] == other["size"].value
    assert "Calibration" in render([run for group in comparisons for run in group.members])
    json.dumps(_sure(comparisons.groups[0]))


def test_suites_record_confidence_where_answers_are_ranked_among_a_list(tiny_model):
    scorer = Scorer(tiny_model("llama"))
    items = SUITE.evaluate(scorer).items
    assert items["shares"].list.sum().to_numpy() == pytest.approx(1, abs=1e-5)
    assert (items["shares"].list.len() == items["choices"].clip(upper_bound=MOST)).all()
    first = items.filter(pl.col("correct"))
    assert first["gold_share"].to_numpy() == pytest.approx(first["shares"].list.first().to_numpy(), rel=1e-5)
    whole = replace(SUITE, candidates="full", calibrate=False).evaluate(scorer).items
    assert whole["shares"].null_count() == whole.height == whole["brier"].null_count()


def test_choices_of_a_harness_task_have_confidence():
    scores = [-3.0, -1.0, -2.0]
    sample = {"arguments": [("q", f" {c}") for c in "abc"], "filtered_resps": [(s, False) for s in scores]}
    row = answer_of([sample | {"target": 2, "acc": 0.0}], "multiple_choice", ("acc", "correct"))
    assert row["gold_share"] == pytest.approx(np.exp(-2) / np.exp(scores).sum())
    assert row["shares"][0] == pytest.approx(np.exp(-1) / np.exp(scores).sum())


def test_a_groups_items_are_aligned_by_key():
    calm = drawn(50, 4)
    comparisons = group_of(calm, calm)
    (group,) = comparisons.groups
    turned = group.runs[0]
    turned._items = turned.items.reverse()
    found = sure_of(group, turned)
    assert found.gold == pytest.approx(calm.gold) and (found.right == calm.right).all()
