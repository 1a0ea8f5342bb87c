"""The ledger's shares by frequency, recovery and depth, on runs built by hand."""

from __future__ import annotations

import polars as pl
import pytest
from scipy import stats

from helpers.stores import bits, made_run
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.fates import shares_by_depth, shares_by_setting, shares_of_fates, shares_restored


def with_bins(run):
    """Half of the facts were said often, the other half seldom."""
    half = run.items.height // 2
    run._items = run.items.with_columns(bin=pl.Series(["head"] * half + ["tail"] * (run.items.height - half)))
    return run


def group_of(*runs):
    return compare([with_bins(run) for run in runs]).groups[0]


def test_fates_by_relation_and_frequency():
    group = group_of(made_run(bits("111110"), compression="none"), made_run(bits("110011")))
    rows = {(row["by"], row["value"]): row for row in shares_of_fates(group, group.runs[0])}
    assert rows["all facts", "all facts"]["counts"] == [3, 2, 1, 0]  # kept, lost, gained, never known
    assert rows["frequency", "head"]["counts"] == [2, 1, 0, 0]
    assert rows["frequency", "tail"]["counts"] == [1, 1, 1, 0]
    assert {value for by, value in rows if by == "relation"} == {"r0", "r1", "r2"}
    lost = rows["frequency", "head"]["lost"]
    assert (lost.value, lost.n) == (pytest.approx(1 / 3), 3) and lost.low < lost.value < lost.high
    assert rows["frequency", "head"]["gained"] is None  # there was nothing to gain
    assert (
        rows["all facts", "all facts"]["rank"].value == pytest.approx(5) and rows["frequency", "head"]["rank"] is None
    )  # two, one


def test_how_far_the_answers_to_lost_facts_sank():
    dense, small = with_bins(made_run(bits("1111"), compression="none")), with_bins(made_run(bits("1000")))
    small._items = small.items.with_columns(log_prob=pl.Series([-9.0, -2.0, -3.0, -7.0]), rank=pl.Series([1, 2, 4, 6]))
    overall = shares_of_fates(compare([dense, small]).groups[0], small)[0]
    expected = stats.ttest_1samp([1.0, 2.0, 6.0], 0).confidence_interval(0.95)
    assert (overall["rank"].value, overall["fell"].value) == (pytest.approx((2 * 4 * 6) ** (1 / 3)), 3)
    assert 0 < overall["rank"].low < 2 and overall["rank"].high > 6
    assert (overall["fell"].low, overall["fell"].high) == pytest.approx((expected.low, expected.high))


def test_what_each_recovery_brought_back_is_set_beside_the_compression_it_recovered():
    dense, small = made_run(bits("111111"), compression="none"), made_run(bits("110000"), sparsity=0.5)
    lora = made_run(bits("111000"), sparsity=0.5, recovery="lora")
    prompt = made_run(bits("111100"), sparsity=0.5, recovery="prompt")
    other = made_run(bits("111111"), sparsity=0.4, recovery="lora")  # of another compressed model
    rows = shares_restored(group_of(dense, small, lora, prompt, other))
    overall = rows[0]
    assert (overall["compressed"], overall["tried"], overall["lost"]) == (small.id, ["lora", "prompt"], 4)
    assert overall["counts"] == [1, 0, 1, 2]  # by redirection, by weights, by both, by neither
    assert [row["counts"] for row in rows if row["value"] == "tail"] == [[1, 0, 0, 2]]


def test_two_recoveries_of_one_strategy_keep_their_names_apart():
    runs = [made_run(bits("11"), compression="none"), made_run(bits("00"))]
    runs += [made_run(bits("10"), recovery="prompt"), made_run(bits("01"), recovery="prompt")]
    runs[2].config["choices"]["corpus"] = "c4"
    assert shares_restored(group_of(*runs))[0]["tried"] == ["prompt c4", "prompt self"]
    assert shares_restored(group_of(*runs))[0]["counts"] == [2, 0, 0, 0]


def test_a_recovery_is_filed_by_what_its_report_says_and_not_by_its_name():
    dense, small = made_run(bits("111"), compression="none"), made_run(bits("000"))
    mine = {"strategy": "rescale", "restores_by": "weights"}
    theirs = {"strategy": "rephrase", "restores_by": "redirection"}
    runs = [
        made_run(bits("100"), recovery="prompt_like", recovered=mine),  # a name that says something else
        made_run(bits("010"), recovery="lora_like", recovered=theirs),
        made_run(bits("001"), recovery="lora_r8", recovered={"strategy": "lora"}),  # of an older store: by its strategy
        made_run(bits("111"), recovery="lora", recovered={"strategy": "rescale"}),  # of an older store: nobody knows
    ]
    overall = shares_restored(group_of(dense, small, *runs))[0]
    assert overall["counts"] == [1, 2, 0, 0]  # by redirection, by weights, by both, by neither
    assert [name for name in overall["tried"] if "unknown" in name] == [
        "lora (unknown whether by weights or by redirection; left out)"
    ]


def test_depths_of_lost_facts():
    def looked_into(run, ranks):
        rows = [{"suite": "lens", "task": f"r{i % 3}", "id": str(i), "depth_rank": ranks[i]} for i in range(len(ranks))]
        run.report["eval"]["lens"] = {"of": "atlas"}
        run._items = pl.concat([run.items, pl.DataFrame(rows)], how="diagonal")
        return run

    dense = looked_into(made_run(bits("1111"), compression="none"), [[4, 1, 1, 1]] * 4)
    small = looked_into(made_run(bits("1000")), [[1, 1, 1, 1], [4, 1, 1, 2], [4, 4, 1, 2], [4, 4, 4, 4]])
    group = compare([dense, small]).groups[0]
    found = shares_by_depth(group, small)
    assert [e.value for e in found["before"]] == [0, 1, 1, 1]
    assert [e.value for e in found["after"]] == pytest.approx([0, 1 / 3, 2 / 3, 0])
    assert {where: share.value for where, share in found["went"].items()} == pytest.approx(
        {"late": 2 / 3, "never there": 1 / 3}
    )
    assert shares_by_depth(group, made_run(bits("1000"))) is None


def test_fates_of_all_settings_beside_each_other():
    dense, small = made_run(bits("111110"), compression="none"), made_run(bits("100011"), target="ff")
    again = made_run(bits("110001"), target="ff")
    again.config["seed"] = 1
    lora = made_run(bits("111011"), target="ff", recovery="lora")
    group = group_of(dense, small, again, lora, made_run(bits("000000"), target="att"))
    rows = {(row["run"], row["value"]): row for row in shares_by_setting(group, shares_restored(group))}
    pooled = rows[small.id, "all facts"]
    assert (pooled["seeds"], pooled["counts"]) == (2, [2, 3, 1, 0])  # kept, lost, gained, never known
    assert pooled["lost"].value == pytest.approx(3 / 5) and pooled["lost"].low < 0.6 < pooled["lost"].high
    assert (pooled["gained"].value, pooled["gained"].n) == (1, 1) and pooled["gained"].low < 0.5  # one fact, twice
    assert [share.value for share in pooled["restored"]] == pytest.approx([0, 2 / 3, 0, 1 / 3])  # of small's three
    assert rows[small.id, "head"]["counts"] == [1.5, 1.5, 0, 0] and rows[small.id, "head"]["gained"] is None
    assert rows[lora.id, "all facts"]["restored"] is None
    assert {value for run, value in rows if run == lora.id} == {"all facts", "head", "tail", "r0", "r1", "r2"}


def test_two_dense_runs_of_one_seed_are_one_baseline():
    twice = [made_run(bits("1100"), compression="none") for _ in range(2)]
    (group,) = compare([*twice, made_run(bits("1000"))]).groups
    assert group.seeds_of(group.dense) == [0]
