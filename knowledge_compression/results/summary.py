"""The table and the figure over a few runs: what each reached, and how far it fell from its dense baseline."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from knowledge_compression.results.store import Run
from knowledge_compression.results.varying import CHOSEN, text_of, varied
from knowledge_compression.statistics import Estimate, accuracies, accuracy, drops, means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# The headline of a suite: the first of these that it has, and whether more of it is better.
HEADLINES = {"accuracy": True, "perplexity": False}


def show(runs: Sequence[Run], baselines: Mapping[str, Run], folder: Path | None = None) -> None:
    """Print the table of runs; with a folder, write it there as CSV beside the figure as PNG and SVG.

    Args:
        runs: finished runs.
        baselines: the dense run of each, by run id.
        folder: where the files go.
    """
    table = drop_table(runs, baselines)
    console = Console()
    if not console.is_terminal:
        console = Console(width=190)  # a log keeps whole rows
    for run in {run.id: run for run in [*baselines.values(), *runs]}.values():
        for suite, why in run.void.items():
            console.print(shown(f"{run.id[:8]}: {suite} gives no figures, as {why}"), style="red")
    if table.is_empty():
        console.print("these suites give no accuracy or perplexity to compare; their results are in each run's folder")
        return
    console.print(as_rich(table))
    for note in sorted(
        {
            f"{run.report['model']['name']}: {run.report['model']['note']}"
            for run in runs
            if run.report["model"].get("note")
        }
    ):
        console.print(shown(note), style="dim")
    for line in sorted(set(filter(None, map(_left_out, runs)))):
        console.print(shown(line), style="dim")
    if folder is None:
        return
    by = _file_name(asked_columns(table))
    table.write_csv(folder / f"table{by}.csv")
    with literal_text():
        figure = drop_figure(table)
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"drop{by}.{suffix}", dpi=150)
    console.print(f"table and figure: {folder / f'table{by}.csv'}, {folder / f'drop{by}.png'}", markup=False)


def literal_text() -> AbstractContextManager[None]:
    """Names in figures are drawn as they stand: a ``$`` in one begins no formula."""
    from matplotlib import rc_context

    return rc_context({"text.parse_math": False})


def shown(text: object) -> Text:
    """Text of a store for a terminal: no markup of rich's, no control characters."""
    return Text("".join(c if c.isprintable() else "�" for c in str(text)))


def _left_out(run: Run) -> str | None:
    """What a run's target left out inside the roles that it takes, in a line; None where that is nothing."""
    parts = [part for part in run.report.get("compression", {}).get("left_out", ()) if part["inside"]]
    if not parts:
        return None
    share = sum(part["share"] for part in parts)
    what = ", ".join(sorted({part["reason"] for part in parts}))
    choices = run.config["choices"]
    return f"{choices['model']}, target={choices['target']}: {share:.2%} of the blocks' weights left out ({what})"


def drop_table(runs: Sequence[Run], baselines: Mapping[str, Run]) -> pl.DataFrame:
    """One row a run and suite, dense baselines first.

    Returns:
        First what varies among the runs and nothing else: a choice among files under its group (``target``), a setting
        as ``asked_<name>`` (``asked_bits``); null where a run has no such thing. Then ``suite, metric, value, dense``,
        ``drop_percent`` (share of the dense value that was lost; for perplexity its rise), the 95 % intervals
        ``value_low, value_high`` and ``drop_low, drop_high`` (paired bootstrap over items or windows of text),
        ``majority_percent`` (the same for always giving the most frequent answer), ``reached_sparsity, reached_bits,
        stored_mb, baseline, run``.
    """
    distinct = list({run.id: run for run in [*baselines.values(), *runs]}.values())
    settings = varied([run.config for run in distinct])
    told = {
        run.id: {(one.name if one.chosen else f"asked_{one.name}"): one.values[i] for one in settings}
        for i, run in enumerate(distinct)
    }
    asked = [
        (run, baselines.get(run.id, run), suite, metric)
        for run in distinct
        for suite in run.config["eval"]
        if not {suite} & (run.void.keys() | baselines.get(run.id, run).void.keys())
        and (metric := next((name for name in HEADLINES if f"{suite}.{name}" in run.metrics), None))
        and f"{suite}.{metric}" in baselines.get(run.id, run).metrics
    ]
    rows = [told[one[0].id] | _row(*one) | intervals for one, intervals in zip(asked, _intervals(asked), strict=True)]
    lists = {name for row in told.values() for name, value in row.items() if not isinstance(value, int | float | None)}
    plain = [{name: text_of(v) if name in lists and v is not None else v for name, v in row.items()} for row in rows]
    return pl.DataFrame(plain, infer_schema_length=None, strict=False)


def asked_columns(table: pl.DataFrame) -> list[str]:
    """The columns of :func:`drop_table` that say what varies."""
    return table.columns[: table.columns.index("suite")]


def _file_name(columns: Sequence[str]) -> str:
    """``_by_target_sparsity``: what varies, as part of a file's name; nothing where nothing does."""
    words = "_".join(re.sub(r"[^\w.-]+", "-", _heading(column)) for column in columns)
    return f"_by_{words}"[:100] if words else ""


def _heading(column: str) -> str:
    return column.removeprefix("asked_")


def as_rich(table: pl.DataFrame) -> Table:
    """The table as a terminal shows it: what varies, what came out."""
    asked = asked_columns(table)
    told = Table(title="What compression did", title_justify="left")
    told.add_column("")
    for column in asked:
        told.add_column(_heading(column), justify="left" if table[column].dtype == pl.String else "right")
    for column in ("suite", "metric"):
        told.add_column(column)
    for column in ("reached sparsity", "reached bits", "MB stored", "value", "drop %", "majority: drop %", "run"):
        told.add_column(column, justify="right")
    for row in table.iter_rows(named=True):
        told.add_row(
            "dense" if row["run"] == row["baseline"] else "",
            *(shown(text_of(row[name])) for name in asked),
            *(shown(row[name]) for name in ("suite", "metric")),
            f"{row['reached_sparsity']:.1%}",
            f"{row['reached_bits']:.3g}",
            f"{row['stored_mb']:.0f}",
            _with_interval(row, "value", ".4g"),
            _with_interval(row, "drop", "+.1f"),
            "" if row["majority_percent"] is None else f"{row['majority_percent']:+.1f}",
            shown(row["run"][:8]),
        )
    return told


def drop_figure(table: pl.DataFrame) -> Figure:
    """Drop against how much was taken, one panel a suite, one line for whatever else varies, the majority dashed.

    How much is the sparsity that was reached; where that is the same in all, the first number that varies, such as the
    bits; where none does, the runs stand side by side. In the style of Figures 2 and 5 of The Cost of Compression
    (Namburi et al., 2023).
    """
    from matplotlib.figure import Figure

    suites = table["suite"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(6.4 * len(suites), 4.4), layout="constrained")
    for axes, suite in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites, strict=True):
        rows = table.filter(pl.col("suite") == suite)
        metric = rows["metric"][0]
        lossy = rows.filter(pl.col("run") != pl.col("baseline"))
        x_column, x_name = _x_axis(lossy)
        apart = [name for name in asked_columns(table) if name not in (x_column, "asked_sparsity")]
        if x_column != "reached_sparsity" and "asked_sparsity" in table.columns and x_column != "asked_sparsity":
            apart.append("asked_sparsity")
        lines = lossy.group_by(apart, maintain_order=True) if apart else [((), lossy)]
        for values, line in lines:
            words = [
                text_of(v) if name in CHOSEN else f"{_heading(name)}={text_of(v)}"
                for name, v in zip(apart, values, strict=True)
                if v not in (None, "none")
            ]
            points = line.sort(x_column)
            x = [100 * v if x_column == "reached_sparsity" else v for v in points[x_column]]
            # Every line starts where nothing was removed and nothing lost, unless nothing is ever removed (int8).
            start = [0.0] if x_column == "reached_sparsity" and points[x_column].max() else []
            (drawn,) = axes.plot([*start, *x], [*start, *points["drop_percent"]], marker="o", label=" ".join(words))
            low, high = (points[f"drop_{end}"].fill_null(points["drop_percent"]) for end in ("low", "high"))
            middle = points["drop_percent"]
            axes.errorbar(x, middle, [middle - low, high - middle], fmt="none", capsize=3, color=drawn.get_color())
        axes.axhline(0, color="grey", linewidth=0.8)
        for majority in rows["majority_percent"].drop_nulls().unique():
            axes.axhline(majority, color="grey", linestyle="--", linewidth=0.8)
            axes.annotate(
                "majority", (1, majority), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey"
            )
        axes.set(xlabel=x_name, title=suite)
        axes.set_ylabel("drop in accuracy (% of dense)" if HEADLINES[metric] else f"rise in {metric} (% of dense)")
        axes.invert_yaxis()
        if apart and axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _x_axis(rows: pl.DataFrame) -> tuple[str, str]:
    """The column that a figure's horizontal axis shows, and what is written there."""
    if rows["reached_sparsity"].n_unique() > 1:
        return "reached_sparsity", "sparsity of the target (%)"
    numbers = (name for name in asked_columns(rows) if rows[name].dtype.is_numeric() and rows[name].n_unique() > 1)
    if (number := next(numbers, None)) is not None and not rows[number].null_count():
        return number, _heading(number)
    return "reached_bits", "mean bits of a weight"


def task_figure(run: Run, suite: str) -> Figure | None:
    """Accuracy of one run by task of one suite, with 95 % intervals; None where the suite has no right answers."""
    from matplotlib.figure import Figure

    by_task = _answers(run, suite, "correct").partition_by("task", as_dict=True)
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


def _row(run: Run, baseline: Run, suite: str, metric: str) -> dict[str, Any]:
    report = run.report.get("compression", {})
    sign = 1.0 if HEADLINES[metric] else -1.0
    value, reference = run.metrics[f"{suite}.{metric}"], baseline.metrics[f"{suite}.{metric}"]
    majority = run.metrics.get(f"{suite}.majority")
    return {
        "suite": suite,
        "metric": metric,
        "value": value,
        "dense": reference,
        "drop_percent": _percent_lost(value, reference, sign),
        **dict.fromkeys(("value_low", "value_high", "drop_low", "drop_high")),
        "majority_percent": None if majority is None else _percent_lost(majority, reference, sign),
        "reached_sparsity": float(report.get("sparsity", 0.0)),
        "reached_bits": float(report.get("bits") or 32.0),
        "stored_mb": run.stored_mb,
        "baseline": baseline.id,
        "run": run.id,
    }


# What each headline is computed from: a column of the items, its estimates, and those of the loss beside the baseline.
_ESTIMATES: Mapping[str, tuple[str, Callable[..., list[Estimate]], Callable[..., list[Estimate]]]] = {
    "accuracy": ("correct", accuracies, drops),
    "perplexity": (
        "nll",
        lambda losses: means(losses, np.exp),
        lambda pairs: means([after - before for before, after in pairs], _percent_risen),
    ),
}


def _intervals(asked: Sequence[tuple[Run, Run, str, str]]) -> list[dict[str, float]]:
    """The 95 % intervals of each value and of what was lost, beside its baseline; none where the items are not there.

    Args:
        asked: run, baseline, suite and headline of each.
    """
    found: list[dict[str, float]] = [{} for _ in asked]
    for headline, (column, estimates, losses) in _ESTIMATES.items():
        values: dict[int, NDArray[Any]] = {}
        pairs: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
        for place, (run, baseline, suite, metric) in enumerate(asked):
            if metric != headline:
                continue
            before, after = (_answers(of, suite, column) for of in (baseline, run))
            if after.height:
                values[place] = after[column].to_numpy()
            both = before.join(after, on=["task", "id"], suffix="_after")
            if both.height and run.id != baseline.id:
                pairs[place] = both[column].to_numpy(), both[f"{column}_after"].to_numpy()
        for name, made, of in (("value", estimates, values), ("drop", losses, pairs)):
            for place, estimate in zip(of, made(list(of.values())), strict=True):
                found[place] |= {f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return found


def _answers(run: Run, suite: str, column: str) -> pl.DataFrame:
    items = run.scan_items()
    there = column in items.collect_schema()
    chosen = items.filter(pl.col("suite") == suite).select("task", "id", *([column] if there else []))
    return chosen.drop_nulls().collect() if there else pl.DataFrame(schema={"task": str, "id": str, column: float})


def _percent_risen(mean_rise: Any) -> Any:
    return 100 * (np.exp(mean_rise) - 1)


def _with_interval(row: Mapping[str, Any], name: str, form: str) -> str:
    value = row["drop_percent"] if name == "drop" else row[name]
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    inner = form.removeprefix("+")
    return f"{value:{form}}" + ("" if low is None else f" [{low:{inner}}, {high:{inner}}]")


def _percent_lost(value: float, reference: float, sign: float) -> float:
    return 100.0 * sign * (reference - value) / reference if reference else 0.0
