"""The parts of a summary that need items or a plotting library: intervals, and the figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from knowledge_compression.results.files import kept_figure
from knowledge_compression.results.store import Run
from knowledge_compression.results.summary import HEADLINES, asked_columns, heading
from knowledge_compression.results.varying import CHOSEN, text_of
from knowledge_compression.statistics import Estimate, accuracies, accuracy, drops, means

_BESIDE = 8  # lines whose legend fits inside the axes; with more lines it is drawn below
_NARROW = 34  # characters of a line's name up to which two fit in one row
_LOOKS = (("-", "o"), ("--", "s"), (":", "D"))  # each for ten lines, as many as there are colours


def literal_text() -> AbstractContextManager[None]:
    """Draw names in figures literally: a ``$`` does not begin a formula."""
    return rc_context({"text.parse_math": False})


def write(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write a summary as ``table.csv``, its figure as ``drop.png`` and ``.svg``, and that of files as ``kept``."""
    table = pl.DataFrame(rows, infer_schema_length=None, strict=False)
    table.write_csv(folder / "table.csv")
    with literal_text():
        figures = {"drop": drop_figure(table), "kept": kept_figure(rows)}
        for name, figure in figures.items():
            if figure is not None:
                for suffix in ("png", "svg"):
                    figure.savefig(folder / f"{name}.{suffix}", dpi=150)


def drop_figure(table: pl.DataFrame) -> Figure | None:
    """The drop against the amount of compression, one panel per suite, one line per other setting, the majority dashed.

    The amount is the sparsity reached; if that is the same in all runs, the first number that varies, e.g. the bits; if
    none does, the runs are side by side. In the style of Figures 2 and 5 of The Cost of Compression (Namburi et al.,
    2023). Runs without a drop (from a dense accuracy of 0) or of an unknown amount (taken from elsewhere) are left out;
    None if there are no others.
    """
    ends = pl.col("drop_percent", "drop_low", "drop_high", "majority_percent").cast(pl.Float64)
    compressed = table.with_columns(ends).filter(pl.col("run") != pl.col("baseline")).drop_nulls("drop_percent")
    shown = [(suite, of, *_x_axis(of)) for (suite,), of in compressed.group_by("suite", maintain_order=True)]
    shown = [(suite, of.drop_nulls(x), x, name) for suite, of, x, name in shown if of[x].count()]
    if not shown:
        return None
    figure = Figure(figsize=(6.4 * len(shown), 4.4), layout="constrained")
    most = 0  # rows of a legend below its axes
    for axes, (suite, lossy, x_column, x_name) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        metric = lossy["metric"][0]
        apart = [name for name in asked_columns(table.columns) if name not in (x_column, "asked_sparsity")]
        if x_column != "reached_sparsity" and "asked_sparsity" in table.columns and x_column != "asked_sparsity":
            apart.append("asked_sparsity")
        lines = lossy.group_by(apart, maintain_order=True) if apart else [((), lossy)]
        for number, (values, line) in enumerate(lines):
            style, marker = _LOOKS[number // 10 % len(_LOOKS)]
            words = [
                text_of(v) if name in CHOSEN else f"{heading(name)}={text_of(v)}"
                for name, v in zip(apart, values, strict=True)
                if v not in (None, "none")
            ]
            points = line.sort(x_column)
            x = [100 * v if x_column == "reached_sparsity" else v for v in points[x_column]]
            # Every line starts at no sparsity and no loss, unless no run has sparsity (int8).
            start = [0.0] if x_column == "reached_sparsity" and points[x_column].max() else []
            y = [*start, *points["drop_percent"]]
            (drawn,) = axes.plot([*start, *x], y, linestyle=style, marker=marker, label=" ".join(words))
            middle = points["drop_percent"]
            low, high = (points[f"drop_{end}"].fill_null(middle) for end in ("low", "high"))
            spread = [(middle - low).clip(0), (high - middle).clip(0)]  # an end may miss its figure by rounding
            axes.errorbar(x, middle, spread, fmt="none", capsize=3, color=drawn.get_color())
        axes.axhline(0, color="grey", linewidth=0.8)
        for majority in lossy["majority_percent"].drop_nulls().unique():
            axes.axhline(majority, color="grey", linestyle="--", linewidth=0.8)
            axes.annotate(
                "majority", (1, majority), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey"
            )
        axes.set(xlabel=x_name, title=suite)
        axes.set_ylabel("drop in accuracy (% of dense)" if HEADLINES[metric] else f"rise in {metric} (% of dense)")
        axes.invert_yaxis()
        if apart and (labels := axes.get_legend_handles_labels()[1]):
            columns = 2 if max(map(len, labels)) <= _NARROW else 1
            below = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.15), "ncols": columns, "fontsize": "small"}
            axes.legend(frameon=False, **(below if len(labels) > _BESIDE else {}))
            most = max(most, math.ceil(len(labels) / columns) if len(labels) > _BESIDE else 0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.set_figheight(4.4 + 0.2 * most)
    return figure


def _x_axis(rows: pl.DataFrame) -> tuple[str, str]:
    """The column on a figure's horizontal axis, and its label."""
    if rows["reached_sparsity"].drop_nulls().n_unique() > 1:
        return "reached_sparsity", "sparsity of the target (%)"
    asked = (rows[name] for name in asked_columns(rows.columns))
    numbers = (column.name for column in asked if column.dtype.is_numeric() and column.n_unique() > 1)
    if (number := next(numbers, None)) is not None and not rows[number].null_count():
        return number, heading(number)
    return "reached_bits", "mean bits of a weight"


def task_figure(run: Run, suite: str) -> Figure | None:
    """Accuracy of one run by task of one suite, with 95 % intervals; None if the suite has no right answers."""
    by_task = run.answers(suite, "correct").partition_by("task", as_dict=True)
    tasks = {str(task): accuracy(answers["correct"].to_numpy()) for (task,), answers in sorted(by_task.items())}
    if not tasks:
        return None
    figure = Figure(figsize=(6.4, 1.2 + 0.24 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    spread = [[100 * (e.value - e.low) for e in tasks.values()], [100 * (e.high - e.value) for e in tasks.values()]]
    axes.barh(list(tasks), [100 * e.value for e in tasks.values()], xerr=spread, error_kw={"linewidth": 0.8})
    axes.invert_yaxis()
    axes.set(xlabel="accuracy (%)", title=suite, xlim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


# The inputs of each headline: a column of the items, its estimates, and those of the loss relative to the baseline.
_ESTIMATES: Mapping[str, tuple[str, Callable[..., list[Estimate]], Callable[..., list[Estimate]]]] = {
    "accuracy": ("correct", accuracies, drops),
    "perplexity": (
        "nll",
        lambda losses: means(losses, np.exp),
        lambda pairs: means([after - before for before, after in pairs], _percent_risen),
    ),
}


def intervals(asked: Sequence[tuple[Run, Run, str, str]]) -> list[dict[str, float]]:
    """The 95 % intervals of each value and of its loss relative to the baseline.

    There are none if the items are missing, or cannot show how they vary (a single one; none that the baseline knows).

    Args:
        asked: run, baseline, suite and headline of each.
    """
    found: list[dict[str, float]] = [{} for _ in asked]
    for headline, (column, estimates, losses) in _ESTIMATES.items():
        values: dict[int, NDArray[Any]] = {}
        pairs: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
        for place, (run, baseline, suite, metric) in enumerate(asked):
            if metric != headline or (column == "correct" and run.answers(suite, "share").height):
                continue  # an accuracy over shares too is not that of the items that are right or wrong
            before, after = (of.answers(suite, column) for of in (baseline, run))
            if after.height:
                values[place] = after[column].to_numpy()
            both = before.join(after, on=["task", "id"], suffix="_after", maintain_order="left")
            if both.height and run.id != baseline.id:
                pairs[place] = both[column].to_numpy(), both[f"{column}_after"].to_numpy()
        for name, made, of in (("value", estimates, values), ("drop", losses, pairs)):
            for place, estimate in zip(of, made(list(of.values())), strict=True):
                if not math.isnan(estimate.low):
                    found[place] |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return found


def _percent_risen(mean_rise: Any) -> Any:
    return 100 * (np.exp(mean_rise) - 1)
