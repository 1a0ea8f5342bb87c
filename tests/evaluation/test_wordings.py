"""Facts asked in several wordings, over a store: what is half and wholly lost, and what brings it back."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from helpers.stores import made_run
from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.findings import check
from knowledge_compression.analysis.page import render
from knowledge_compression.analysis.wordings import HALF, WHOLLY, brought_back, half_lost, knowledge
from knowledge_compression.results.store import Run

PER_FACT = 3
DENSE = "111 111 111 110 100 111 000 111"
SMALL = "100 000 111 010 000 110 010 000"
PROMPT = "110 100 111 110 100 111 010 000"
LORA = "101 000 111 110 000 111 000 100"


def run(answers: str, **settings: Any) -> Run:
    """A run whose facts are asked in three wordings each; ``1`` is right."""
    right = [c == "1" for c in answers.replace(" ", "")]
    made = made_run(right, tasks=("r0",), **settings)
    items = made.scan_items().collect()
    place = pl.int_range(items.height)
    fact, wording = (place // PER_FACT).cast(pl.String), (place % PER_FACT).cast(pl.String)
    made._items = items.with_columns(fact.alias("fact"), wording.alias("wording"))
    return made


@pytest.fixture
def runs() -> list[Run]:
    weights, redirection = (
        {"strategy": of, "restores_by": by} for of, by in (("lora", "weights"), ("prompt", "redirection"))
    )
    return [
        run(DENSE, compression="none"),
        run(SMALL),
        run(PROMPT, recovery="prompt", recovered=redirection),
        run(LORA, recovery="lora", recovered=weights),
    ]


def test_knowledge_is_of_the_fact(runs: list[Run]) -> None:
    (group,) = compare(runs)
    rows = {row["run"]: row for row in knowledge(group)}
    assert set(rows) == {one.id for one in runs}
    for one, answers in zip(runs, (DENSE, SMALL, PROMPT, LORA), strict=True):
        facts = answers.split()
        row = rows[one.id]
        assert row["facts"] == len(facts)
        known = [np.mean([fact == "111" for fact in facts]), np.mean([fact == "000" for fact in facts])]
        assert [row["known"][0].value, row["known"][2].value] == pytest.approx(known)
        agreeing = [a == b for f in facts for a, b in ((f[0], f[1]), (f[0], f[2]), (f[1], f[2]))]
        assert row["consistency"].value == pytest.approx(np.mean(agreeing))
        assert row["consistency"].low <= row["consistency"].value <= row["consistency"].high


def test_half_lost_facts_and_what_brought_them_back_are_those_of_a_plain_loop(runs: list[Run]) -> None:
    how: dict[str, str] = {}
    lost: dict[str, list[int]] = {}
    for fact, (before, after) in enumerate(zip(DENSE.split(), SMALL.split(), strict=True)):
        known = [w for w in range(PER_FACT) if before[w] == "1"]
        gone = [w for w in known if after[w] == "0"]
        if gone and len(known) > 1:  # of a fact known in one wording alone, no other can be kept
            how[str(fact)], lost[str(fact)] = (HALF if len(gone) < len(known) else WHOLLY), gone
    table = half_lost(runs[0], runs[1], "atlas")
    assert {row["fact"]: row["how"] for row in table.iter_rows(named=True)} == how
    assert set(how.values()) == {HALF, WHOLLY} and "4" not in how
    assert table.height == sum(map(len, lost.values()))

    def back(answers: str, kind: str) -> list[float]:
        said = answers.split()
        return [float(np.mean([said[int(f)][w] == "1" for w in lost[f]])) for f in lost if how[f] == kind]

    (group,) = compare(runs)
    rows = {row["by"]: row for row in brought_back(group)}
    assert list(rows) == ["redirection", "weights", "redirection less weights"]
    for by, answers in (("redirection", PROMPT), ("weights", LORA)):
        half, wholly = back(answers, HALF), back(answers, WHOLLY)
        assert rows[by]["facts"] == [len(half), len(wholly)]
        assert [of.value for of in rows[by]["back"]] == pytest.approx([np.mean(half), np.mean(wholly)])
        assert rows[by]["difference"].value == pytest.approx(np.mean(half) - np.mean(wholly))
    last = rows["redirection less weights"]["difference"].value
    assert last == pytest.approx(rows["redirection"]["difference"].value - rows["weights"]["difference"].value)


def test_the_report_tells_both_and_is_silent_where_there_is_one_wording(runs: list[Run]) -> None:
    comparisons = compare(runs)
    told = markdown.report(comparisons, check(comparisons))
    assert "## Known in all, some or none of the wordings" in told
    assert "## Facts lost in one wording and kept in another" in told
    page = render(runs)
    assert "Facts in several wordings</h2>" in page and "redirection less weights" in page
    once = compare([made_run([True, False], compression="none"), made_run([False, False])])
    assert "wording" not in markdown.report(once, check(once))
    assert not knowledge(next(iter(once))) and not brought_back(next(iter(once)))


def test_a_suite_without_facts_beside_one_with_them_has_no_wordings(runs: list[Run]) -> None:
    """One table holds the items of all of a run's suites, so the harness's have the columns, all null."""
    for one in runs:
        items = one.scan_items().collect()
        nothing = [pl.lit(None, dtype=pl.String).alias(name) for name in ("fact", "wording")]
        one._items = pl.concat([items, items.with_columns(pl.lit("harness").alias("suite"), *nothing)])
        one.config["eval"]["harness"] = {}
        one.report["eval"]["harness"] = one.report["eval"]["atlas"]
        one.metrics["harness.accuracy"] = one.metrics["atlas.accuracy"]
    found = {group.asked.suite: knowledge(group) for group in compare(runs)}
    assert set(found) == {"atlas", "harness"} and len(found["atlas"]) == len(runs) and found["harness"] == []
    assert "Facts in several wordings</h2>" in render(runs)
