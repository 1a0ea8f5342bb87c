"""The study of facts and derived compositions: its tables over several trainings whose answers are known."""

from __future__ import annotations

from runpy import run_path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from helpers.places import ROOT
from helpers.stores import made_run
from knowledge_compression.results.store import RunStore

FOLDER = ROOT / "experiments" / "facts_or_reasoning"
FACTS, TOLD, DERIVED = 60, 20, 50


@pytest.fixture(scope="module")
def study():
    return SimpleNamespace(**run_path(str(FOLDER / "world.py")))


def asked(seed, facts, told, derived, *, sparsity=None, drop=0):
    """A run of one training that answers the first ``facts`` of the facts rightly, and so on."""
    counts = {"facts": FACTS, "told": TOLD, "derived": DERIVED - drop}
    right = np.concatenate(
        [np.arange(n) < most for n, most in zip(counts.values(), (facts, told, derived), strict=True)]
    )
    compression = "magnitude" if sparsity else "none"
    run = made_run(right, compression=compression, target="all", sparsity=sparsity, tasks=["r"])
    ids = [f"{name}{i}" for name, n in counts.items() for i in range(n)]
    tasks = ["born_in"] * FACTS + ["told.homeland"] * TOLD + ["derived.homeland"] * counts["derived"]
    run._items = run.items.with_columns(
        suite=pl.Series(["world"] * FACTS + ["world_two_hop"] * (len(ids) - FACTS)),
        task=pl.Series(tasks),
        id=pl.Series(ids),
        fact=pl.Series(ids),
        choices=pl.lit(5, dtype=pl.Int64),
    )
    run.config |= {"model": {"training": {"seed": seed}}, "eval": {"world": {}, "world_two_hop": {}}}
    run.report["model"]["made"] = {"recipe": {"training": {"seed": seed}}}
    run.report["eval"] = {suite: {"fingerprint": "f"} for suite in ("world", "world_two_hop")}
    return run


def filled(folder, *runs):
    store = RunStore(folder)
    for run in runs:
        store.write(run)
    return folder


def both_trainings():
    return [asked(seed, 60, 20, dense) for seed, dense in ((3, 30), (1, 40))] + [
        asked(seed, *right, sparsity=sparsity)
        for seed, right in ((3, (60, 20, 20)), (1, (48, 20, 30)))
        for sparsity in (0.4, 0.2)
    ]


def test_shares_are_over_the_questions_of_all_trainings(study, tmp_path):
    of = study.read(filled(tmp_path / "store", *both_trainings()))
    assert [training.seed for training in of.trainings] == [1, 3]
    assert of.runs == ["sparsity=0.2", "sparsity=0.4"]
    above = {name: of.kept(name, *of.runs).mean(axis=(1, 2)) for name in study.NAMES}
    assert above["facts"] == pytest.approx([1 - 0.2, (1 + 0.8) / 2 - 0.2])
    assert above["told"] == pytest.approx([0.8, 0.8])
    assert above["derived"] == pytest.approx([0.7 - 0.2, 0.5 - 0.2])

    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text(f"by hand\n\n{study.MARKER}\n\nas it was\n")
    study.main([str(tmp_path / "store"), str(out)])
    page = (out / "README.md").read_text()
    assert page.startswith("by hand") and "as it was" not in page
    assert "2 trainings, each asked the same questions: 60 facts, 20 told, 50 derived" in page
    assert "| 1 | 100.0 % | 100.0 % | 80.0 % |" in page and "| 3 | 100.0 % | 100.0 % | 60.0 % |" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| sparsity=0.4")]
    cells = row.split(" | ")
    assert [cell.split(" %")[0] for cell in cells[1:4]] == ["87.5", "100.0", "60.0"]
    assert cells[4].startswith("+27.5 [") and cells[5].startswith("+40.0 [")


def test_trainings_with_other_runs_or_questions_are_refused(study, tmp_path):
    lacking = both_trainings()[:-1]
    with pytest.raises(ValueError, match="training 3 has not the runs of training 1"):
        study.read(filled(tmp_path / "lacking", *lacking))
    fewer = [asked(1, 60, 20, 40), asked(1, 60, 20, 30, sparsity=0.2)]
    fewer += [asked(3, 60, 20, 40, drop=1), asked(3, 60, 20, 30, sparsity=0.2, drop=1)]
    with pytest.raises(ValueError, match="training 3 was asked other questions"):
        study.read(filled(tmp_path / "fewer", *fewer))
    with pytest.raises(ValueError, match="has no training"):
        study.read(filled(tmp_path / "guessing", asked(1, 60, 20, 10), asked(1, 60, 20, 9, sparsity=0.2)))
