"""The table and the figures at the end of a run: every value with its interval."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from helpers.stores import bits, made_run
from knowledge_compression import statistics
from knowledge_compression.analysis.metrics import with_intervals
from knowledge_compression.results import drawing, summary

BEFORE = 3.0 + np.arange(12) / 20
AFTER = BEFORE + 0.2 + (np.arange(12) % 3) * 0.1


def with_perplexity(run, losses):
    """A run that scored windows of text too."""
    rows = [{"suite": "perplexity", "task": "c4", "id": str(i), "nll": loss} for i, loss in enumerate(losses.tolist())]
    run._items = pl.concat([run.items, pl.DataFrame(rows)], how="diagonal")
    run.config["eval"]["perplexity"] = {}
    run.metrics["perplexity.perplexity"] = float(np.exp(losses.mean()))
    return run


@pytest.fixture
def rows():
    dense = with_perplexity(made_run(bits("1111110000"), compression="none"), BEFORE)
    small = with_perplexity(made_run(bits("1110000000")), AFTER)
    return summary.drop_rows([small], {small.id: dense})


def test_values_and_losses_have_their_intervals(rows):
    accuracy, perplexity = (row for row in rows if row["run"] != row["baseline"])
    wilson = statistics.accuracy(bits("1110000000"))
    assert (accuracy["value_low"], accuracy["value_high"]) == (wilson.low, wilson.high)
    fall = statistics.drop(bits("1111110000"), bits("1110000000"))
    assert (accuracy["drop_percent"], accuracy["drop_low"], accuracy["drop_high"]) == (50.0, fall.low, fall.high)
    assert perplexity["value_low"] < perplexity["value"] < perplexity["value_high"]
    assert perplexity["drop_percent"] == pytest.approx(100 * (np.exp(0.3) - 1))
    assert np.exp(0.2) - 1 < perplexity["drop_low"] / 100 < np.exp(0.3) - 1 < perplexity["drop_high"] / 100
    # Paired by window, so it is far narrower than that of either perplexity.
    assert perplexity["drop_high"] - perplexity["drop_low"] < 20


def test_an_accuracy_over_shares_too_has_no_interval_of_the_other_items():
    """As TruthfulQA's two tasks give in one suite."""

    def asked(right, share, **how):
        run = made_run(bits(right), **how)
        shares = [{"suite": "atlas", "task": "mc2", "id": str(i), "share": share} for i in range(30)]
        run._items = pl.concat([run.items, pl.DataFrame(shares)], how="diagonal")
        run.metrics["atlas.accuracy"] = (bits(right).sum() + 30 * share) / (len(right) + 30)
        return run

    dense, small = asked("1111110000", 0.1, compression="none"), asked("1110000000", 0.1)
    rows = summary.drop_rows([small], {small.id: dense})
    assert [row["value"] for row in rows] == pytest.approx([9 / 40, 6 / 40])
    assert {row[name] for row in rows for name in ("value_low", "value_high", "drop_low", "drop_high")} == {None}
    assert with_intervals([small])[small.id]["atlas.accuracy"][1] is None
    drawing.drop_figure(pl.DataFrame(rows, infer_schema_length=None))


def test_a_dense_accuracy_of_0_leaves_nothing_to_lose(tmp_path):
    dense, small = made_run(bits("0000"), compression="none"), made_run(bits("1000"))
    dense.metrics["atlas.majority"] = small.metrics["atlas.majority"] = 1.0
    rows = summary.drop_rows([small], {small.id: dense})
    told = {row[name] for row in rows for name in ("drop_percent", "drop_low", "drop_high", "majority_percent")}
    assert told == {None}
    (drops,) = (column for column in summary.as_rich(rows).columns if column.header == "drop %")
    assert [*drops.cells] == ["", ""]
    drawing.write(rows, tmp_path)
    assert "NaN" not in (tmp_path / "table.csv").read_text() and not [*tmp_path.glob("drop*")]


@pytest.mark.parametrize("rise", [0.1, 0.2, 0.3, 0.4])
def test_an_end_that_misses_its_figure_by_rounding_is_drawn(rise):
    """Every window of text rises by the same, so both ends of the interval are the figure, but for the last digit."""
    dense = with_perplexity(made_run(bits("1"), compression="none"), BEFORE)
    small = with_perplexity(made_run(bits("1")), BEFORE + rise)
    rows = [row for row in summary.drop_rows([small], {small.id: dense}) if row["suite"] == "perplexity"]
    (axes,) = drawing.drop_figure(pl.DataFrame(rows, infer_schema_length=None)).axes
    assert [*axes.lines[0].get_ydata()] == pytest.approx([100 * np.expm1(rise)])


def test_the_terminal_shows_them(rows):
    console = Console(width=190, record=True, file=io.StringIO())
    console.print(summary.as_rich(rows))
    shown = console.export_text()
    assert "0.3 [0.1078, 0.6032]" in shown and "+50.0 [" in shown


def test_a_run_by_itself_is_called_by_what_was_done(capsys):
    """Nothing varies beside one dense run, so no column says what the other row is."""
    dense, small = made_run(bits("1111110000"), compression="none"), made_run(bits("1110000000"))
    choices = small.config["choices"]
    summary.show([small], {small.id: dense})
    (line,) = (line for line in capsys.readouterr().out.splitlines() if small.id[:8] in line)
    assert f"{choices['target']} {choices['compression']}" in line


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_a_narrow_terminal_shows_whole_cells_of_fewer_columns(rows, width):
    """What varies, the values and the drops stay; what gives way is named, and what all rows share is in the title."""
    accuracy = [row for row in rows if row["metric"] == "accuracy"]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary.as_rich(accuracy, width))
    lines = console.export_text().splitlines()
    text = "\n".join(lines)
    assert max(map(len, map(str.rstrip, lines))) <= width and "…" not in text
    assert "0.3 [0.1078, 0.6032]" in text and "+50.0 [" in text
    everything = {column.header for column in summary.as_rich(accuracy).columns}
    there = {column.header for column in summary.as_rich(accuracy, width).columns}
    title = lines[0].removeprefix("What compression did").removeprefix(":").split()
    for name in everything - there:
        said = accuracy[0][name] in title if name in ("suite", "metric") else name in text.partition("no room for: ")[2]
        assert said, name
    assert (everything == there) == (width == 200)


def test_where_three_settings_vary_80_columns_show_the_intervals_of_the_drops_unbroken(tmp_path, capsys):
    dense = made_run(bits("1111110000"), compression="none")
    runs = [
        made_run(bits("1110000000"), compression="magnitude", target="encoder_att", sparsity=0.25),
        made_run(bits("1110000001"), compression="structured", target="ff", sparsity=0.5),
    ]
    table = summary.drop_rows(runs, {run.id: dense for run in runs})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary.as_rich(table, 80))
    text = console.export_text()
    lines = text.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert len([line for line in lines if line.startswith("│")]) == len(table)  # no row is broken
    assert re.search(r"│ +0\.3 │ +\+50\.0 \[", text) and "the intervals of value" in text
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    summary.show(runs, {run.id: dense for run in runs}, folder)
    said = capsys.readouterr().out.splitlines()
    assert {path for line in said if (path := line.partition(": ")[2]) and Path(path).is_file()} == {
        str(file) for file in folder.iterdir() if file.suffix != ".svg"
    }


def test_the_bars_of_tasks_have_intervals():
    figure = drawing.task_figure(made_run(bits("1111110000")), "atlas")
    (axes,) = figure.axes
    bars, errors = [c for c in axes.containers if hasattr(c, "patches")], axes.containers
    assert len(bars[0].patches) == 3 and len(errors) == 2
    assert drawing.task_figure(made_run(bits("10")), "latency") is None


def test_what_a_target_leaves_out_inside_its_roles_is_said(capsys):
    """And not what it leaves out because it does not take its role."""
    dense, small = made_run(bits("1111110000"), compression="none"), made_run(bits("1110000000"))
    part = {"path": "model.layers.*.mixer.conv1d.weight", "role": "mixer", "parameters": 8, "reason": "convolution"}
    attention = part | {"reason": "role", "share": 0.5, "inside": False}
    summary.show([small], {small.id: dense})
    assert "left out" not in capsys.readouterr().out
    inside = [part | {"share": 0.01, "inside": True}, part | {"share": 0.0025, "inside": True, "reason": "bias"}]
    small.report["compression"]["left_out"] = [attention, *inside]
    summary.show([small], {small.id: dense})
    said = capsys.readouterr().out
    choices = small.config["choices"]
    wanted = (
        f"{choices['model']}, target={choices['target']}: 1.25% of the blocks' weights left out (bias, convolution)"
    )
    assert wanted in " ".join(said.split())


def test_suites_without_a_headline_end_without_a_table(tmp_path, capsys):
    run = made_run(bits("10"))
    run.metrics = {"similarity.attention": 0.9}
    run.config["eval"] = {"similarity": {}}
    summary.show([run], {run.id: run}, tmp_path)
    assert "no accuracy or perplexity to compare" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_layers_that_no_calibration_text_reached_are_told(capsys):
    dense, small = made_run(bits("1111110000"), compression="none"), made_run(bits("1110000000"), compression="gptq")
    for fallbacks, wanted in (
        ({"dead_input": 3}, None),
        ({"few_tokens": 5, "no_tokens": 2}, "compression=gptq: 7 of 64 layers were compressed without calibration"),
    ):
        small.report["compression"] |= {"fallbacks": fallbacks, "layers_touched": 64}
        summary.show([small], {small.id: dense})
        said = " ".join(capsys.readouterr().out.split())
        assert wanted in said and "(2: none)" in said if wanted else "without calibration" not in said
