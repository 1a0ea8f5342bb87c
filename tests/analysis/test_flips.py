"""Flips by the published definition, in plain loops, wherever they are told: ledger, tables, findings, advice, page."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.stores import made_run
from knowledge_compression.advise import main as advise
from knowledge_compression.analysis import markdown, tables
from knowledge_compression.analysis.advice import enough, kept, smallest
from knowledge_compression.analysis.claims import CLAIMS
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.fates import shares_by_setting, shares_of_fates
from knowledge_compression.analysis.findings import CONTRADICTED, SUPPORTED, check
from knowledge_compression.analysis.flips import change_in_accuracy, flips_of
from knowledge_compression.analysis.ledger import fates
from knowledge_compression.results.store import RunStore
from knowledge_compression.statistics import proportion

ANSWERS = st.sampled_from("abcd")  # of which "a" is right


def run_that_says(answers: list[str], seed: int = 0, **rest):
    """A run with these answers, of which "a" is right."""
    run = made_run([answer == "a" for answer in answers], **rest)
    run._items = run.items.with_columns(prediction=pl.Series(answers, dtype=pl.String))
    run.config["seed"] = seed
    return run


def plain_flips(before: list[str], after: list[str]) -> tuple[int, int, int]:
    """Right to wrong, wrong to right, and wrong to another wrong."""
    to_wrong = to_right = among_wrong = 0
    for b, a in zip(before, after, strict=True):
        if b == "a" and a != "a":
            to_wrong += 1
        elif b != "a" and a == "a":
            to_right += 1
        elif b != a:
            among_wrong += 1
    return to_wrong, to_right, among_wrong


@settings(max_examples=30)
@given(st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=40))
def test_flips_are_those_of_the_published_definition(pairs):
    before, after = map(list, zip(*pairs, strict=True))
    ledger = fates(run_that_says(before, compression="none"), run_that_says(after), "atlas")
    found = flips_of(ledger)
    to_wrong, to_right, among_wrong = plain_flips(before, after)
    assert (found.lost, found.gained, found.wrong_otherwise) == (to_wrong, to_right, among_wrong)
    assert found.flips == proportion(to_wrong + to_right, len(pairs))
    assert found.all_flips == proportion(sum(b != a for b, a in pairs), len(pairs))
    assert found.kept + found.lost + found.gained + found.never_known == len(pairs)
    assert change_in_accuracy(ledger).value == pytest.approx((to_right - to_wrong) / len(pairs))


@settings(max_examples=15)
@given(st.lists(st.tuples(ANSWERS, ANSWERS, ANSWERS), min_size=2, max_size=12))
def test_flips_of_a_setting_are_means_over_its_seeds(triples):
    before, *seeds = map(list, zip(*triples, strict=True))
    runs = [run_that_says(after, seed) for seed, after in enumerate(seeds)]
    group = compare([run_that_says(before, compression="none"), *runs]).groups[0]
    row = shares_by_setting(group, [])[0]
    counts = [plain_flips(before, after) for after in seeds]
    n = len(triples)
    assert row["flips"].value == pytest.approx(sum(lost + gained for lost, gained, _ in counts) / 2 / n)
    assert row["all_flips"].value == pytest.approx(sum(map(sum, counts)) / 2 / n)
    assert row["wrong_otherwise"] == sum(others for *_, others in counts) / 2
    assert group.flips[runs[0].id].value == row["flips"].value and row["flips"].low <= row["flips"].value


def test_without_the_answers_themselves_only_flips_are_known():
    dense, small = run_that_says(["a", "b", "b"], compression="none"), run_that_says(["b", "c", "a"])
    small._items = small.items.with_columns(prediction=pl.lit(None, dtype=pl.String))
    found = flips_of(fates(dense, small, "atlas"))
    assert (found.lost, found.gained) == (1, 1) and found.wrong_otherwise is None and found.all_flips is None
    assert flips_of(fates(dense, small, "atlas").clear()) is None
    group = compare([dense, small]).groups[0]
    row = shares_by_setting(group, [])[0]
    assert row["flips"].value == pytest.approx(2 / 3) and row["all_flips"] is row["wrong_otherwise"] is None
    assert tables.fates_table(compare([dense, small])).rows[0]["other wrong answer"] is None


def test_ledger_table_and_markdown_tell_them():
    dense, small = run_that_says(list("aabbbb"), compression="none"), run_that_says(list("abcbab"))
    comparisons = compare([dense, small])
    row = shares_of_fates(comparisons.groups[0], small)[0]
    assert row["wrong_otherwise"] == 1 and row["flips"].value == pytest.approx(2 / 6)
    told = tables.fates_table(comparisons).rows[0]
    assert told["other wrong answer"] == "1" and told["all_flips"].value == pytest.approx(3 / 6)
    heads, _, line = markdown.fates(comparisons)
    cells = dict(zip(heads.split(" | "), line.split(" | "), strict=True))
    assert cells["flips"].startswith("33.3 % [") and cells["all flips"].startswith("50.0 % [")


def quantized(answers: np.ndarray, bits: int):
    run = made_run(answers, compression="rtn", sparsity=0.0, target="all")
    run.config["compression"] = {"bits": bits}
    return run


def test_findings_see_flips_where_accuracy_stands_still():
    luck = np.random.default_rng(0).random(2000)
    dense, even = luck < 0.5, (luck < 0.47) | (luck > 0.97)  # as many gained as lost
    worse = (luck < 0.42) | (luck > 0.92)
    runs = [made_run(dense, compression="none"), quantized(even, 8), quantized(worse, 4)]
    claims = {claim.name: claim for claim in CLAIMS if claim.measure.against_dense}
    little, more = check(compare(runs), [claims["eight_bits_flip_little"], claims["fewer_bits_flip_more"]])
    assert little.status == CONTRADICTED and more.status == SUPPORTED
    flipped = float((dense != even).mean())
    assert little.findings[0].effect.value == pytest.approx(-flipped)
    assert more.findings[0].effect.value == pytest.approx(float((dense != worse).mean()) - flipped)
    assert (
        claims["eight_bits_flip_little"].measure.words(little.findings[0].effect).startswith(f"{-100 * flipped:+.1f}")
    )


def test_advice_takes_the_smallest_setting_that_also_flips_little(tmp_path, capsys):
    known = np.arange(1000) < 500
    steady, restless = known.copy(), known.copy()
    steady[:5] = False
    restless[:5] = False
    restless[500:600] = True  # keeps as much, and answers a hundred others anew
    runs = [made_run(known, compression="none"), made_run(steady, sparsity=0.3), made_run(restless, sparsity=0.5)]
    for run, megabytes in zip(runs, (100, 60, 30), strict=True):
        run.report["compression"] = {**run.report["compression"], "stored_bytes": megabytes * 1e6}
        RunStore(tmp_path).write(run)
    rows = {row.size_mb: row for row in kept(compare(runs).groups[0])}
    assert (rows[30].flips, rows[60].flips) == (0.105, 0.005) and rows[30].flips_at_most > 0.105
    assert rows[100].flips_at_most == 0 and enough(rows[100], 1.0, 0.0)
    assert smallest([*rows.values()], 0.95).size_mb == 30 and smallest([*rows.values()], 0.95, 0.05).size_mb == 60
    advise([str(tmp_path), "--keep", "95%", "--flips", "5%"])
    said = capsys.readouterr().out
    assert "Smallest that keeps 95% and flips at most 5% with 95 % confidence: sparsity=0.3 (60.0 MB)" in said
    for nonsense in ("often", "0", "120%"):
        with pytest.raises(SystemExit) as end:
            advise([str(tmp_path), "--flips", nonsense])
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1 and "--flips 5% or --flips 0.05" in said
