"""Facts in several wordings: ParaRel as a suite, and knowledge and consistency by plain loops."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tasks import ANIMALS, CITIES
from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.pararel import ParaRel
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import ask
from knowledge_compression.evaluation.wordings import facts, wording_metrics
from knowledge_compression.models import Model

PATTERNS = ["the [X] is in [Y] .", "[Y] was the [X] .", "the [X] wrote to [Y] of the moon ."]


def write(folder: Path, rows: list[tuple[str, str, str]], patterns: list[str] = PATTERNS) -> Path:
    """A data folder in which P1 and P2 have both patterns and facts, P3 facts alone."""
    for below in ("pattern_data/graphs_json", "trex_lms_vocab"):
        (folder / "pararel" / below).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"uuid": uuid, "sub_label": subject, "obj_label": gold}) for uuid, subject, gold in rows]
    for name in ("P1", "P2", "P3"):
        (folder / "pararel" / "trex_lms_vocab" / f"{name}.jsonl").write_text("\n".join(lines))
        if name != "P3":
            asked = "\n".join(json.dumps({"pattern": pattern, "lemma": "x"}) for pattern in patterns)
            (folder / "pararel" / "pattern_data/graphs_json" / f"{name}.jsonl").write_text(asked)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, [(str(i), animal, CITIES[i % 3]) for i, animal in enumerate(ANIMALS)])


@pytest.mark.parametrize("architecture", ["bert", "t5", "llama"])
def test_every_fact_is_asked_in_every_paraphrase(
    architecture: str, folder: Path, tiny_model: Callable[[str], Model]
) -> None:
    scorer = Scorer(tiny_model(architecture))
    suite = ParaRel(str(folder))
    found = suite.evaluate(scorer)
    items = found.items
    assert items["id"].to_list() == [f"P{r}/{i}/{n}" for r in (1, 2) for i in range(5) for n in range(3)]
    assert items["prompt"][0] == "the dog is in [MASK] ." and set(items["choices"]) == {3}
    assert set(items["prediction"]) <= set(CITIES[:3])
    first = items.filter(pl.col("wording") == "0")["correct"].mean()
    assert found.metrics["first_wording.accuracy"] == first
    assert found.metrics["consistency"] == pytest.approx(plain_consistency(items))
    joined = suite.joined({name: ask(part, scorer) for name, part in suite.parts().items()})
    assert joined.items.equals(items) and joined.metrics == found.metrics
    some = ParaRel(str(folder), limit=4).evaluate(scorer)
    assert some.items.height == 12 and some.items["fact"].n_unique() == 4 and set(some.items["choices"]) == {3}


def plain_consistency(items: pl.DataFrame) -> float:
    """ParaRel's definition: of each relation all pairs of paraphrases of all facts, then the mean over relations."""
    shares = []
    for task in items["task"].unique().sort():
        agree = []
        of_task = items.filter(pl.col("task") == task)
        for fact in of_task["fact"].unique():
            said = of_task.filter(pl.col("fact") == fact)["prediction"].to_list()
            for i in range(len(said)):
                for j in range(i + 1, len(said)):
                    agree.append(said[i] == said[j])
        if agree:
            shares.append(sum(agree) / len(agree))
    return sum(shares) / len(shares)


@given(
    st.lists(
        st.tuples(st.sampled_from("AB"), st.integers(0, 3), st.sampled_from("xyz"), st.booleans()),
        min_size=1,
        max_size=30,
    )
)
def test_knowledge_and_consistency_are_those_of_plain_loops(answers: list[tuple[str, int, str, bool]]) -> None:
    """Whatever the number of wordings of each fact; those of one wording do not count."""
    rows = [
        {"task": task, "fact": f"{task}{fact}", "wording": str(n), "prediction": said, "correct": right}
        for n, (task, fact, said, right) in enumerate(answers)
    ]
    items = pl.DataFrame(rows)
    by_fact: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_fact.setdefault(row["fact"], []).append(row)
    several = {fact: of for fact, of in by_fact.items() if len(of) > 1}
    metrics = wording_metrics(items)
    assert bool(metrics) == bool(several)
    if not several:
        return
    known = {fact: sum(row["correct"] for row in of) for fact, of in several.items()}
    assert metrics["known_in_all"] == np.mean([known[fact] == len(of) for fact, of in several.items()])
    assert metrics["known_in_none"] == np.mean([known[fact] == 0 for fact in several])
    assert metrics["known_in_some"] == pytest.approx(1 - metrics["known_in_all"] - metrics["known_in_none"])
    assert metrics["consistency"] == pytest.approx(plain_consistency(items))
    for name, such in (("consistency_known", True), ("consistency_unknown", False)):
        part = items.filter(pl.col("fact").is_in([fact for fact in several if (known[fact] > 0) == such]))
        assert (metrics[name] == pytest.approx(plain_consistency(part))) if part.height else name not in metrics
    table = {row["fact"]: row for row in facts(items).iter_rows(named=True)}
    assert table.keys() == several.keys()
    for fact, of in several.items():
        pairs = list(combinations(of, 2))
        assert table[fact]["pairs"] == len(pairs)
        assert table[fact]["agreeing"] == sum(a["prediction"] == b["prediction"] for a, b in pairs)


def test_a_fact_said_twice_is_dropped_and_counted(tmp_path: Path, tiny_model: Callable[[str], Model]) -> None:
    write(tmp_path, [("1", "dog", "rome"), ("2", "cat", "paris"), ("1", "dog", "rome")])
    found = ParaRel(str(tmp_path)).evaluate(Scorer(tiny_model("bert")))
    assert found.items.height == found.items["id"].n_unique() == 12 and found.description["duplicates_dropped"] == 2


@pytest.mark.parametrize(
    ("rows", "patterns", "options", "said"),
    [
        ([("1", "dog", "rome")], PATTERNS, {}, "P1 has fewer than two answers"),
        ([("1", "dog", "rome"), ("1", "dog", "paris")], PATTERNS, {}, "P1/1 has two answers, rome and paris"),
        ([("1", "dog", "")], PATTERNS, {}, r"P1\.jsonl:1: needs the texts sub_label and obj_label"),
        ([("1", "dog", "rome"), ("2", "cat", "paris")], ["[X] is"], {}, r"P1\.jsonl:1: needs a pattern"),
        (
            [("1", "dog", "rome"), ("2", "cat", "paris")],
            PATTERNS,
            {"relations": ["P3"]},
            "no relation 'P3'; relations: P1",
        ),
        ([("1", "dog", "rome"), ("2", "cat", "paris")], PATTERNS, {"limit": 0}, "limit=0"),
        ([("1", "dog", "rome"), ("2", "cat", "paris")], PATTERNS, {"top_k": [0]}, "top_k=0"),
    ],
)
def test_bad_data_is_one_line(
    rows: Any, patterns: list[str], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write(tmp_path, rows, patterns)
    with pytest.raises(BadInput, match=said) as refused:
        ParaRel(str(tmp_path), **options).fingerprint()
    assert "\n" not in str(refused.value)


def test_without_a_folder_it_says_so(tmp_path: Path) -> None:
    for data_dir in (None, str(tmp_path)):
        with pytest.raises(DataUnavailable, match="eval=pararel reads a folder"):
            ParaRel(data_dir).check_data()


@pytest.mark.slow
@pytest.mark.data
def test_real_data_is_whole(data_dir: Path) -> None:
    suite = ParaRel(str(data_dir))
    parts = suite.parts()
    assert len(parts) == 39 and suite._duplicates["P19"] == 0
    assert sum(len(part.questions.asked) for part in parts.values()) == 224_674  # type: ignore[attr-defined]
