"""Facts against reasoning in the same runs, on stores whose answers are known."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from helpers.stores import made_run
from knowledge_compression.analysis import kinds, markdown
from knowledge_compression.analysis.claims import CLAIMS, FACTS, REASONING
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.findings import CONTRADICTED, SUPPORTED, UNDECIDED, check

CLAIM = next(claim for claim in CLAIMS if claim.name == "facts_outlast_reasoning")
LUCK = np.random.default_rng(5).random((2, 300))


def asked_both(facts, reasoning, *, wordings=1, **settings):
    """A run that was asked for facts with four choices, for reasoning with two, and for what is neither."""
    run = made_run(np.concatenate([np.repeat(facts, wordings), reasoning, reasoning]), **settings)
    count, n = len(facts) * wordings, len(reasoning)
    run._items = run.items.with_columns(
        suite=pl.Series(["atlas"] * count + ["harness"] * 2 * n),
        task=pl.Series(["r"] * count + ["arc_easy"] * n + ["boolq"] * n),
        choices=pl.Series([4] * count + [2] * 2 * n),
        fact=pl.Series([str(i // wordings) for i in range(count)] + [None] * 2 * n),
    )
    run.config["eval"]["harness"] = {}
    run.report["eval"]["harness"] = {"fingerprint": "f"}
    return run


def store(facts: float, reasoning: float, reasoned: float = 0.9):
    luck = LUCK
    return [
        asked_both(luck[0] < 0.85, luck[1] < reasoned, compression="none"),
        asked_both(luck[0] < facts, luck[1] < reasoning),
        asked_both(luck[0] < facts, luck[1] < reasoning, sparsity=0.4),
    ]


@pytest.mark.parametrize(
    ("facts", "reasoning", "expected"), [(0.8, 0.6, SUPPORTED), (0.4, 0.88, CONTRADICTED), (0.55, 0.7, UNDECIDED)]
)
def test_the_claim_is_decided_by_what_is_kept_above_chance(facts, reasoning, expected):
    (verdict,) = check(compare(store(facts, reasoning)), [CLAIM])
    (finding,) = verdict.findings
    assert verdict.status == expected

    def share(kept, dense, luck, chance):  # over again, in plain numbers
        return (np.mean(luck < kept) - chance) / (np.mean(luck < dense) - chance)

    by_hand = share(facts, 0.85, LUCK[0], 1 / 4) - share(reasoning, 0.9, LUCK[1], 1 / 2)
    assert finding.effect.value == pytest.approx(by_hand)
    assert finding.effect.low < by_hand < finding.effect.high and finding.effect.n == 600
    assert finding.suite == "atlas against harness arc_easy" and len(finding.pairs) == 2
    assert "points of what was above chance" in CLAIM.measure.words(finding.effect)


def test_the_interval_is_that_of_a_plain_bootstrap():
    runs = store(0.6, 0.7)
    (row, _) = kinds.by_kind(compare(runs), (FACTS, REASONING))
    rng = np.random.default_rng(1)
    found = []
    for _ in range(2000):
        shares = []
        for luck, levels, chance in ((LUCK[0], (0.85, 0.6), 0.25), (LUCK[1], (0.9, 0.7), 0.5)):
            drawn = luck[rng.integers(len(luck), size=len(luck))]
            shares.append((np.mean(drawn < levels[1]) - chance) / (np.mean(drawn < levels[0]) - chance))
        found.append([*shares, shares[0] - shares[1]])
    for estimate, values in zip([*row["kept"], row["difference"]], np.transpose(found), strict=True):
        assert [estimate.low, estimate.high] == pytest.approx(list(np.quantile(values, [0.025, 0.975])), abs=0.03)


def test_where_the_dense_model_guesses_nothing_is_said():
    (verdict,) = check(compare(store(0.6, 0.5, reasoned=0.48)), [CLAIM])
    assert verdict.findings == ()


def test_a_task_at_which_the_dense_model_guesses_does_not_count():
    runs = store(0.6, 0.7)
    for run in runs:  # every other item is now of a task whose answers are heads or tails
        half = np.arange(run.items.height) % 2 == 1
        guess = np.random.default_rng(3).random(run.items.height) < 0.5
        reasoned = run.items["task"].eq("arc_easy").to_numpy() & half
        run._items = run.items.with_columns(
            task=pl.Series(np.where(reasoned, "winogrande", run.items["task"].to_numpy())),
            correct=pl.Series(np.where(reasoned, guess, run.items["correct"].to_numpy())),
        )
    (row, _) = kinds.by_kind(compare(runs), (FACTS, REASONING))
    assert row["suites"] == ["atlas", "harness arc_easy"] and row["kept"][1].n == 150


def test_wordings_of_a_fact_are_one_item():
    alone, twice = (
        [
            asked_both(LUCK[0] < level, LUCK[1] < level, wordings=n, compression=compression)
            for level, compression in ((0.9, "none"), (0.6, "magnitude"))
        ]
        for n in (1, 2)
    )
    one, other = (kinds.by_kind(compare(runs), (FACTS, REASONING))[0]["kept"][0] for runs in (alone, twice))
    assert one == other and one.n == 300


def test_the_table_names_both_suites_and_is_empty_without_them():
    told = markdown.facts_and_reasoning(compare(store(0.6, 0.7)))
    assert len(told.rows) == 2 and told.rows[0][0][1:] == ["atlas", "harness arc_easy"]
    assert "Facts and reasoning under the same compression" in markdown.report(compare(store(0.6, 0.7)), [])
    only = [made_run(LUCK[0] < 0.9, compression="none"), made_run(LUCK[0] < 0.5)]
    assert markdown.facts_and_reasoning(compare(only)).rows == [] and check(compare(only), [CLAIM])[0].findings == ()
