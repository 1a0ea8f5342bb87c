"""The published answers of five models, and the study of them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import polars as pl
import pytest

from knowledge_compression.analysis.published import EXPERIMENTS

FOLDER = EXPERIMENTS / "published_answers"


@pytest.fixture
def study(monkeypatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(FOLDER)  # as when it is run
    return SimpleNamespace(**runpy.run_path(str(FOLDER / "study.py")))


@pytest.fixture
def chance(study) -> ModuleType:
    return sys.modules["chance"]


def test_the_study_counts_what_was_published(data_dir: Path, study, chance, tmp_path, monkeypatch):
    data = data_dir / "quantization_flips"
    if not data.is_dir():
        pytest.skip(f"no {data}")
    monkeypatch.setattr(chance, "PERMUTATIONS", 19)
    monkeypatch.setattr(chance, "RESAMPLES", 99)
    (tmp_path / "README.md").write_text(f"By hand.\n{study.MARKER}\nold\n")
    study.main(data, tmp_path / "store", tmp_path)
    page, table = (tmp_path / "README.md").read_text(), pl.read_csv(tmp_path / "results.csv")
    assert page.startswith("By hand.\n") and "old" not in page
    assert "All counts and percentages are those of Table 1" in page and (tmp_path / "figures/flips.png").is_file()
    questions = json.loads((data / "_bench_items.json").read_text())
    assert table.height == 30
    for row in table.iter_rows(named=True):
        name = row["model"].replace("/", "__")
        dense, small = (
            json.loads((data / f"{name}__{precision}__{row['benchmark']}.json").read_text())["preds"]
            for precision in ("fp16", row["precision"])
        )
        gold = [question["answer"] for question in questions[row["benchmark"]]]
        both = list(zip(dense, small, gold, strict=True))
        assert row["lost"] == sum(b == g != a for b, a, g in both)
        assert row["gained"] == sum(b != g == a for b, a, g in both)
        assert row["wrong_otherwise"] == sum(b != a and g not in (a, b) for b, a, g in both)
        assert row["kept"] == sum(b == a == g for b, a, g in both)
    assert "738 of 1208" in page  # pooled at int4: 738 to wrong, 470 to right


def test_a_count_that_is_not_the_published_one_is_named(study):
    published = pl.read_csv(FOLDER / "published" / "table1.csv")
    row = {"model": published["model"][0], "benchmark": "arc", "precision": "int8", "items": 1000, "kept": 748}
    row |= {"lost": 5, "gained": 13, "wrong_otherwise": 9, "flips": 0.019, "all_flips": 0.028, "accuracy": 0.762}
    assert study.differences(pl.DataFrame([row]), published[:1]) == ["Qwen/Qwen2.5-1.5B-Instruct arc int8: gained"]
    assert study.differences(pl.DataFrame([row | {"gained": 14}]), published[:1]) == []
    assert study.differences(pl.DataFrame([row]), published) == ["29 published rows have no answers"]


def made_answers(chance, flips: np.ndarray, sure: np.ndarray):
    items = pl.DataFrame({"task": ["arc"] * flips.shape[1], "id": [str(i) for i in range(flips.shape[1])]})
    return chance.Answers(items, np.ones(flips.shape, bool), sure, {}, {"int4": flips})


def overlap(chance, monkeypatch, flips, sure):
    monkeypatch.setattr(chance, "PERMUTATIONS", 199)
    return chance.overlap(made_answers(chance, flips, sure), flips)


def test_flips_that_are_independent_meet_as_chance_has_it(chance, monkeypatch):
    rng = np.random.default_rng(0)
    flips, sure = rng.random((5, 1000)) < 0.1, rng.random((5, 1000))
    found = overlap(chance, monkeypatch, flips, sure)
    plain = sum((a & b).sum() for i, a in enumerate(flips) for b in flips[i + 1 :])
    assert found.together == plain and found.items.sum() == 1000
    assert all(test.p > 0.05 and test.low <= plain <= test.high for test in found.pairs)
    rates = flips.mean(1)
    expected = 1000 * sum(a * b for i, a in enumerate(rates) for b in rates[i + 1 :])
    assert found.pairs[0].value == pytest.approx(expected, rel=0.05)


def test_what_shared_unsureness_makes_meet_is_explained_by_it_and_what_else_does_is_not(chance, monkeypatch):
    explained = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        unsure = rng.random(400)  # of the item, the same for all models
        sure = np.tile(1 - unsure, (5, 1))
        by_unsureness = rng.random((5, 400)) < 0.4 * (unsure > 0.8)
        found = overlap(chance, monkeypatch, by_unsureness, sure)
        assert found.pairs[0].p < 0.05 and found.together > found.pairs[0].high
        explained.append(found.pairs[1].p > 0.05)
    assert sum(explained) >= 7  # 9.5 expected; fewer than 7 once in a thousand draws of ten
    by_item = by_unsureness | (rng.random(400) < 0.05)
    found = overlap(chance, monkeypatch, by_item, sure)
    assert all(test.p < 0.05 and found.together > test.high for test in found.pairs)


def test_hardness_counts_the_other_models_that_are_wrong(chance):
    known = np.array([[True, False], [True, False], [False, False]])
    items = pl.DataFrame({"task": ["arc", "arc"], "id": ["0", "1"]})
    answers = chance.Answers(items, known, np.ones(known.shape), {}, {})
    assert answers.others_wrong.tolist() == [[1, 2], [1, 2], [0, 2]]
