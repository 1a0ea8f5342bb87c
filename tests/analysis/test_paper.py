"""From a store to a paper: one table and one figure of everything, and what to cite."""

from __future__ import annotations

import re

import numpy as np
import polars as pl
import pytest

from helpers.stores import bits, made_run
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.paper import how_to_cite, results_table, values_table
from knowledge_compression.analysis.tables import PaperTable, write
from knowledge_compression.report import main
from knowledge_compression.results.store import RunStore


@pytest.fixture
def runs():
    dense = made_run(bits("1111111100"), compression="none", id="dense000")
    pruned = made_run(bits("1111000010"), target="a_b%", sparsity=0.4, id="pruned00")
    return [dense, pruned]


def test_the_table_has_what_was_counted_by_hand(runs):
    dense, pruned = results_table(compare(runs)).rows
    assert dense["accuracy"].value == 0.8 and dense["drop"] is dense["flips"] is dense["lost_of_known"] is None
    assert pruned["accuracy"].value == 0.5
    assert pruned["drop"].value == pytest.approx((0.8 - 0.5) / 0.8)
    assert pruned["flips"].value == pytest.approx((4 + 1) / 10)  # four lost and one gained
    assert pruned["lost_of_known"].value == pytest.approx(4 / 8)
    assert pruned["drop"].low <= pruned["drop"].value <= pruned["drop"].high


def test_latex_shows_names_literally_and_figures_in_percent_with_intervals(runs):
    latex = results_table(compare(runs)).latex()
    (row,) = [line for line in latex.splitlines() if r"a\_b\%" in line]
    cells = row.removesuffix(r" \\").split(" & ")
    head = latex.splitlines()[2].removesuffix(r" \\").split(" & ")
    told = dict(zip(head, cells, strict=True))
    assert told["sparsity"] == "40.0" and re.fullmatch(r"50\.0 \[\d+\.\d, \d+\.\d\]", told["accuracy"])
    assert r"\toprule" in latex and r"\bottomrule" in latex


def test_latex_leaves_out_what_all_rows_share_and_says_it_beside_the_caption(runs, tmp_path):
    """A table of one model on one suite would be wider than a page; numbers stand to the right."""
    table = results_table(compare(runs))
    assert table.same.keys() >= {"model", "suite", "seeds"} and "accuracy" not in table.same
    write(table, tmp_path)
    caption, opening, _, head, *_ = (tmp_path / "results.tex").read_text().splitlines()
    columns = head.removesuffix(r" \\").split(" & ")
    assert not {"model", "suite", "seeds"} & {*columns}
    assert f"model {runs[0].config['choices']['model']}, " in caption and "seeds 1" in caption
    sides = dict(zip(columns, opening.rpartition("{")[2].strip("}"), strict=True))
    assert sides["setting"] == "l" and sides["accuracy"] == sides["drop"] == "r"
    assert {"model", "suite", "seeds"} <= {*pl.read_csv(tmp_path / "results.csv").columns}
    gained = PaperTable("drops", "A drop.", [{"drop": -0.1, "run": "3-bit"}, {"drop": 0.1, "run": "4-bit"}]).latex()
    assert "$-$10.0 & 3-bit" in gained and "{rl}" in gained  # a minus sign, but a hyphen in a name
    alone = PaperTable("one", "A row.", table.rows[:1])
    assert not alone.same and "model & suite" in alone.latex()


def test_values_without_right_answers_have_a_table_of_their_own(runs):
    for run, loss in zip(runs, (3.0, 3.5), strict=True):
        run.config["eval"] = run.report["eval"] = {"perplexity": {}}
        run.metrics = {"perplexity.perplexity": float(np.exp(loss))}
        run._items = run.items.with_columns(correct=pl.lit(None, pl.Boolean), nll=loss, suite=pl.lit("perplexity"))
    comparisons = compare(runs)
    assert not results_table(comparisons).rows
    rows = values_table(comparisons).rows
    assert [row["metric"] for row in rows] == ["perplexity"] * 2
    values = [getattr(row["value"], "value", row["value"]) for row in rows]
    assert values == pytest.approx([np.exp(3.0), np.exp(3.5)])


def test_what_to_cite_names_papers_models_versions_and_every_run(runs):
    _, pruned = runs
    pruned.config["choices"] |= {"compression": "gptq", "allocation": "owl"}
    pruned.report["compression"]["calibration"] = "digest"
    pruned.config["choices"]["corpus"] = "c4"
    pruned.report["model"] |= {"hub_id": "some/model", "commit": "c0ffee"}
    pruned.environment["packages"] = {"torch": "2.13.0"}
    told = how_to_cite(compare(runs))
    for part in (
        "2210.17323",
        "2310.05175",
        "1910.10683",
        "some/model at c0ffee",
        "torch 2.13.0",
        "`dense000`",
        "`pruned00`",
    ):
        assert part in told, part
    assert "2301.00774" not in told and "@software{knowledge_compression" in told


@pytest.mark.slow
def test_the_command_writes_a_table_and_a_figure_of_everything(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    store = RunStore(tmp_path / "outputs")
    for run in runs:
        store.write(run)
    main([str(store.folder), "-o", str(tmp_path / "report.html"), "--figures", str(tmp_path / "figures")])
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"results.tex", "results.csv", "results.pdf", "results.svg", "how_to_cite.md"} <= names
    assert (tmp_path / "figures" / "results.pdf").read_bytes().startswith(b"%PDF")
    assert pl.read_csv(tmp_path / "figures" / "results.csv")["accuracy"].to_list() == [0.8, 0.5]
