"""The study of calibration text: which facts its text tells, and its figures on runs whose answer is known."""

from __future__ import annotations

import runpy
from types import SimpleNamespace

import polars as pl
import pytest

from helpers.places import ROOT
from helpers.stores import bits, made_run
from knowledge_compression.evaluation.atlas import Atlas
from knowledge_compression.results.store import RunStore

FOLDER = ROOT / "experiments" / "calibration_text"
FACTS = SimpleNamespace(**runpy.run_path(str(FOLDER / "facts.py")))
STUDY = SimpleNamespace(**runpy.run_path(str(FOLDER / "study.py")))


def stated(cloze) -> str:
    return cloze.sentence.replace("[MASK]", cloze.gold)


def test_the_text_tells_half_of_the_facts_and_nothing_that_is_asked() -> None:
    told, questions, text = FACTS.told_facts(), Atlas().clozes(), set(FACTS.sentences())
    assert 0.45 < len(told) / len(questions) < 0.55
    assert not {stated(one) for one in questions} & text
    assert {one.fact for one in Atlas(wordings="all").clozes() if stated(one) in text} == told


def test_no_relation_tells_what_another_asks_as_untold() -> None:
    told = FACTS.told_facts()
    names = [(one.fact in told, frozenset((one.subject, one.gold))) for one in Atlas().clozes()]
    assert not {pair for is_told, pair in names if is_told} & {pair for is_told, pair in names if not is_told}


def calibrated(answers: str, corpus: str, seed: int, told: list[str], untold: list[str]):
    run = made_run(bits(answers), compression="none" if corpus == "none" else "gptq")
    run.config["choices"]["corpus"], run.config["seed"] = corpus, seed
    run.config["corpus"] = {"name": corpus}
    run._items = run.items.with_columns(pl.Series("fact", told + untold))
    run.metrics["perplexity.perplexity"] = 30.0 + seed
    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> RunStore:
    told = sorted(FACTS.told_facts())[:4]
    untold = sorted({one.fact for one in Atlas().clozes()} - FACTS.told_facts())[:4]
    store = RunStore(tmp_path_factory.mktemp("store"))
    for answers, corpus, seed in (
        ("11101110", "none", 0),  # knows three of each half
        *(("10001000", "c4", 0), ("10001000", "c4", 1)),
        *(("11101000", "text", 0), ("11001100", "text", 1)),
    ):
        store.write(calibrated(answers, corpus, seed, told, untold))
    return store


def test_gains_are_over_c4_and_the_leak_is_what_told_facts_gain_beyond_untold_ones(store: RunStore) -> None:
    base, facts = STUDY.rows_of(store.folder)
    assert (base.told.value, base.untold.value) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert [one.value for one in base.gains] == [0, 0]
    assert (facts.told.value, facts.untold.value) == (pytest.approx(5 / 6), pytest.approx(3 / 6))
    assert [one.value for one in facts.gains] == [pytest.approx(3 / 6), pytest.approx(1 / 6)]
    assert facts.leak.value == pytest.approx(2 / 6)
    assert facts.perplexity == pytest.approx(30.5)


def test_the_page_is_written_below_its_marker(store: RunStore, tmp_path) -> None:
    (tmp_path / "README.md").write_text(f"# Title\n\n{STUDY.MARKER}\nearlier\n")
    STUDY.main(store.folder, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# Title\n") and "earlier" not in page
    assert "| sentences that state facts | 30.5 | 83.3 % " in page
    assert (tmp_path / "figures" / "calibration_text.png").stat().st_size > 1000


def test_texts_with_other_seeds_than_c4_are_refused(store: RunStore, tmp_path) -> None:
    told, untold = sorted(FACTS.told_facts())[:4], sorted({c.fact for c in Atlas().clozes()} - FACTS.told_facts())[:4]
    other = RunStore(tmp_path)
    for answers, corpus, seed in (("11101110", "none", 0), ("10001000", "c4", 0), ("11101000", "text", 1)):
        other.write(calibrated(answers, corpus, seed, told, untold))
    with pytest.raises(ValueError, match=r"corpus=text was run with the seeds \[1\], c4 with \[0\]"):
        STUDY.rows_of(tmp_path)
