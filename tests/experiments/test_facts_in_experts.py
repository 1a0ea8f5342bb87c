"""The study of facts in experts, on removals whose answer is known beforehand."""

from __future__ import annotations

import sys
from itertools import product
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from helpers.places import ROOT
from helpers.stores import made_run
from knowledge_compression.analysis.comparisons import compare

SCRIPT = ROOT / "experiments" / "facts_in_experts" / "study.py"
BLOCKS, EXPERTS, RELATIONS, FACTS = range(2), range(4), 4, 80


@pytest.fixture(scope="module")
def study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # as when it is run
        globals_of = run_path(str(SCRIPT))
    globals_of["main"].__globals__.update(PERMUTATIONS=100, RESAMPLES=100)
    return SimpleNamespace(**globals_of)


@pytest.fixture(scope="module")
def removals(study):
    return sys.modules["removals"]


def answered(lost: np.ndarray, target: str, compression: str, block: int | None, experts: list[int] | None, seed: int):
    """A run that answers all but these facts right, and the first of them never."""
    run = made_run(~lost & (np.arange(FACTS) > 0), compression=compression, target=target,
                   tasks=[f"r{relation}" for relation in range(RELATIONS)])  # fmt: skip
    items = run.items.with_columns(
        bin=pl.Series(["head" if i % 8 < 4 else "tail" for i in range(FACTS)]),
        log_prob=pl.Series(np.where(lost, -3.0, -1.0)),
    )
    limits = {"blocks": None if block is None else [block], "experts": experts}
    run.config |= {"target": limits if compression != "none" else {}, "seed": seed}
    run.config["model"] = {}
    run.report["model"]["made"] = {"recipe": {"training": {"seed": 0}}}
    run._items = items
    return run


def world(lost_by) -> list:
    """A dense run and every removal; ``lost_by(kind, block, number)`` says which facts one loses."""
    runs = [answered(np.zeros(FACTS, bool), "all", "none", 0, None, 0)]
    for block, number in product(BLOCKS, EXPERTS):
        runs.append(answered(lost_by("expert", block, number), "experts", "ablation", block, [number], 0))
        for target in ("experts", "att"):
            runs.append(answered(lost_by(target, block, number), target, "random", block, None, number))
    for block in BLOCKS:
        runs.append(answered(lost_by("smallest", block, 0), "experts", "magnitude", block, None, 0))
        runs.append(answered(lost_by("all", block, 0), "experts", "ablation", block, None, 0))
    return [*runs, answered(np.ones(FACTS, bool), "experts", "ablation", None, None, 0)]


def one_relation_an_expert(kind: str, block: int, number: int) -> np.ndarray:
    """Each expert of the first block keeps one relation; what else is removed costs random facts of all."""
    relation = np.arange(FACTS) % RELATIONS
    if kind == "expert":
        return (relation == number) & (block == 0)
    if kind == "all":
        return np.full(FACTS, block == 0)
    seed = [ord(kind[0]), block, number]
    return np.random.default_rng(seed).random(FACTS) < (0.2 if kind != "smallest" else 0.0)


@pytest.fixture(scope="module")
def model(removals):
    (group,) = compare(world(one_relation_an_expert))
    return removals.model_of(group)


def test_removals_are_those_of_the_runs(removals, study, model):
    assert {kind: len(found.names) for kind, found in model.removals.items()} == {
        study.EXPERTS: 8, study.SPREAD: 8, study.ATTENTION: 8, removals.SMALLEST: 2, study.BLOCK: 2,
        study.WHOLE: 1,
    }  # fmt: skip
    assert model.removals[study.EXPERTS].names == list(product(BLOCKS, EXPERTS))
    assert model.removals[study.EXPERTS].lost.shape == (8, FACTS - 1)  # the dense model knows all but one
    assert (model.removals[study.EXPERTS].fell == 2.0 * model.removals[study.EXPERTS].lost).all()


def test_facts_kept_by_one_expert_each_are_told_from_facts_lost_at_random(study, model):
    experts, spread = model.removals[study.EXPERTS], model.removals[study.SPREAD]
    assert (experts.times == 1).all() and (spread.times > 1).any()
    assert (study.leaned_on(experts.fell) == 1).all() and study.leaned_on(spread.fell).mean() > 1.2
    value, low, high, p = study.by_relation(model, experts)
    assert value == pytest.approx(1.0) and low < high < 0.5 and p < 0.02
    assert study.by_relation(model, spread)[3] > 0.05
    found = {(block, expert, relation) for (block, expert), relation, *_ in study.favoured(model, experts)}
    assert found == {(0, number, f"r{number}") for number in EXPERTS}
    assert not study.favoured(model, spread)
    assert study.gini_of(model, experts).low > study.gini_of(model, spread).high


@pytest.mark.parametrize(("counts", "expected"), [([5, 5, 5, 5], 0.0), ([0, 0, 0, 8], 0.75), ([0, 0, 0, 0], 0.0)])
def test_gini(study, counts, expected):
    assert study.gini(np.array(counts, float)) == pytest.approx(expected)


def test_the_page_says_what_was_found(study, model, tmp_path):
    study.main.__globals__["models"] = lambda _: [model]
    study.main.__globals__["reads_of"] = lambda model: 2 * model.removals[study.EXPERTS].lost
    (tmp_path / "README.md").write_text(f"By hand.\n{study.MARKER}\nold\n")
    study.main(tmp_path, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("By hand.\n") and "old" not in page
    assert "| 0 | one expert | 0.0 % [0.0, 4.6] | 100.0 % [95.4, 100.0] |" in page  # each fact by one removal
    assert "| 0 | 0/1 | r1 | 20 | 5.1 |" in page
    assert "| 0 | the last token | 1.0 | 100.0 % [100.0, 100.0] | 79 |" in page
    assert "| 0 | none | 7.0 | 0.0 % [0.0, 4.6] | 0 |" in page
    assert (tmp_path / "figures" / "facts_in_experts.png").stat().st_size > 10_000
    study.main.__globals__["models"] = lambda _: []
    with pytest.raises(SystemExit, match="holds no model with every kind of removal"):
        study.main(tmp_path, tmp_path)
