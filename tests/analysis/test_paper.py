"""From a store to a paper: one table and one figure of everything, and what to cite."""

from __future__ import annotations

import re

import numpy as np
import polars as pl
import pytest

from helpers.stores import bits, made_run
from knowledge_compression.analysis import markdown, paper
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.paper import how_to_cite, results_table, values_table
from knowledge_compression.analysis.tables import PaperTable, write
from knowledge_compression.report import main
from knowledge_compression.results.drawing import drop_figure
from knowledge_compression.results.store import RunStore
from knowledge_compression.statistics import Estimate


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


@pytest.fixture
def figure_of(tmp_path, monkeypatch):
    """The panels of ``results.pdf``, by suite."""

    def panels(runs):
        drawn = []
        monkeypatch.setattr(paper, "drop_figure", lambda table: drawn.append(drop_figure(table)) or drawn[0])
        paper.draw(compare(runs), tmp_path)
        return {axes.get_title(): axes for axes in drawn[0].axes}

    return panels


def test_every_figure_of_a_row_is_over_the_same_seeds(runs, figure_of):
    """All of the known facts are kept under one seed, and half of them under the other."""
    dense = runs[0]
    seeds = [made_run(bits("1111111100"), id="seed0000"), made_run(bits("1111000000"), id="seed0001")]
    for number, run in enumerate(seeds):
        run.config["seed"] = number
    comparisons = compare([dense, *seeds])
    row = results_table(comparisons).rows[1]
    assert row["seeds"] == 2
    assert row["drop"].value == pytest.approx(row["lost_of_known"].value) == pytest.approx(0.25)
    assert row["flips"].value == pytest.approx(0.2)
    told = markdown.fates(comparisons)[-1]
    assert [cell.split(" %")[0].strip() for cell in told.split(" | ")[2:]] == ["60.0", "25.0", "20.0", "20.0", "25.0"]
    assert [*figure_of([dense, *seeds])["atlas"].lines[0].get_ydata()] == pytest.approx([25])


def test_suites_whose_dense_runs_are_separate_are_all_drawn(figure_of):
    """One dense run was asked the facts, another one read the text; the compressed run did both."""

    def reading(run, loss):
        run.config["eval"] = run.config["eval"] | {"perplexity": {}}
        run.report["eval"] = run.report["eval"] | {"perplexity": {}}
        run.metrics["perplexity.perplexity"] = float(np.exp(loss))
        windows = [{"suite": "perplexity", "task": "c4", "id": str(i), "nll": loss + i / 10} for i in range(3)]
        run._items = pl.concat([run.items, pl.DataFrame(windows)], how="diagonal")
        return run

    asked, read = made_run(bits("1110"), compression="none"), reading(made_run(bits("1"), compression="none"), 3.0)
    del read.config["eval"]["atlas"], read.report["eval"]["atlas"]
    assert figure_of([asked, read, reading(made_run(bits("1000")), 3.5)]).keys() == {"atlas", "perplexity"}


def test_a_suite_whose_other_items_have_shares_says_which_are_compared(figure_of):
    """As TruthfulQA's two tasks in one suite: at a terminal the accuracy counts both."""

    def with_shares(run, share):
        rows = [{"suite": "atlas", "task": "mc2", "id": str(i), "share": share} for i in range(4)]
        run._items = pl.concat([run.items, pl.DataFrame(rows)], how="diagonal")
        return run

    runs = [with_shares(made_run(bits("1100"), compression="none"), 0.5), with_shares(made_run(bits("1000")), 0.1)]
    (name,) = {row["suite"] for row in results_table(compare(runs)).rows}
    assert name == "atlas (only items that are right or wrong)" and figure_of(runs).keys() == {name}


def test_a_drop_from_a_dense_accuracy_of_0_is_left_blank(tmp_path):
    comparisons = compare([made_run(bits("000"), compression="none"), made_run(bits("100"), target="ff")])
    write(results_table(comparisons), tmp_path)
    assert "nan" not in (tmp_path / "results.tex").read_text()
    assert pl.read_csv(tmp_path / "results.csv")["drop"].null_count() == 2
    assert "nan" not in "".join(markdown.fates(comparisons))


def test_counts_and_percentiles_are_written_as_people_read_them():
    table = PaperTable("distance", "", [{"kl_p99_9": 1.25, "positions": 12345.0}], shares=False)
    assert "kl p99.9 & positions" in table.latex() and "1.25 & 12345 " in table.latex()


def test_the_ends_of_an_interval_stand_beside_their_figure_in_a_csv():
    estimate = Estimate(0.5, 0.4, 0.6, 10)
    table = PaperTable("one", "", [{"x": None, "y": 1}, {"x": estimate, "y": 2}])
    assert table.frame().columns == ["x", "x_low", "x_high", "y"]


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
