"""The table and the figure over a few runs: what each reached, and how far it fell from its dense baseline."""

from __future__ import annotations

import logging
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
        for suite, count in run.not_finite.items():
            console.print(f"[red]{run.id[:8]}: {count} answers to {suite} are not finite; it gives no figures[/red]")
    if table.is_empty():
        console.print("these suites give no accuracy or perplexity to compare; what they found is in each run's folder")
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
    if folder is None:
        return
    table.write_csv(folder / "table.csv")
    with literal_text():
        figure = drop_figure(table)
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"drop.{suffix}", dpi=150)
    console.print(f"table and figure: {folder / 'table.csv'}, {folder / 'drop.png'}", markup=False)


def literal_text() -> AbstractContextManager[None]:
    """Names in figures are drawn as they stand: a ``$`` in one begins no formula."""
    from matplotlib import rc_context

    return rc_context({"text.parse_math": False})


def shown(text: object) -> Text:
    """Text of a store for a terminal: no markup of rich's, no control characters."""
    return Text("".join(c if c.isprintable() else "�" for c in str(text)))


def drop_table(runs: Sequence[Run], baselines: Mapping[str, Run]) -> pl.DataFrame:
    """One row a run and suite, dense baselines first.

    Returns:
        Columns ``model, target, compression, recovery, asked_sparsity, suite, metric, value, dense``, then
        ``drop_percent`` (share of the dense value that was lost; for perplexity its rise), the 95 % intervals
        ``value_low, value_high`` and ``drop_low, drop_high`` (paired bootstrap over items or windows of text),
        ``majority_percent`` (the same for always giving the most frequent answer), ``reached_sparsity, bits,
        stored_mb, run``.
    """
    distinct = {run.id: run for run in [*baselines.values(), *runs]}
    asked = [
        (run, baselines.get(run.id, run), suite, metric)
        for run in distinct.values()
        for suite in run.config["eval"]
        if (metric := next((name for name in HEADLINES if f"{suite}.{name}" in run.metrics), None))
        and f"{suite}.{metric}" in baselines.get(run.id, run).metrics
    ]
    rows = [_row(*one) | intervals for one, intervals in zip(asked, _intervals(asked), strict=True)]
    return pl.DataFrame(rows, infer_schema_length=None)


def as_rich(table: pl.DataFrame) -> Table:
    """The table as a terminal shows it."""
    told = Table(title="What compression did", title_justify="left")
    for column in ("model", "target", "compression", "recovery", "suite", "metric"):
        told.add_column(column)
    for column in ("sparsity", "bits", "MB stored", "value", "drop %", "majority: drop %", "run"):
        told.add_column(column, justify="right")
    for row in table.iter_rows(named=True):
        told.add_row(
            *(shown(row[name]) for name in ("model", "target", "compression", "recovery", "suite", "metric")),
            f"{row['reached_sparsity']:.1%}",
            f"{row['bits']:.3g}",
            f"{row['stored_mb']:.0f}",
            _with_interval(row, "value", ".4g"),
            _with_interval(row, "drop", "+.1f"),
            "" if row["majority_percent"] is None else f"{row['majority_percent']:+.1f}",
            shown(row["run"][:8]),
        )
    return told


def drop_figure(table: pl.DataFrame) -> Figure:
    """Drop against sparsity, one panel a suite, one line a model, target and compression, the majority baseline dashed.

    In the style of Figures 2 and 5 of The Cost of Compression (Namburi et al., 2023).
    """
    from matplotlib.figure import Figure

    suites = table["suite"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(6.4 * len(suites), 4.4), layout="constrained")
    for axes, suite in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites, strict=True):
        rows = table.filter(pl.col("suite") == suite)
        metric = rows["metric"][0]
        for (model, target, compression, recovery), line in rows.filter(pl.col("compression") != "none").group_by(
            ["model", "target", "compression", "recovery"], maintain_order=True
        ):
            label = " ".join(str(part) for part in (model, target, compression, recovery) if part not in ("none", ""))
            points = line.sort("reached_sparsity")
            # Every line starts where nothing was removed and nothing lost, unless nothing is ever removed (int8).
            start = [0.0] if points["reached_sparsity"].max() else []
            x = [*start, *(100 * points["reached_sparsity"])]
            (drawn,) = axes.plot(x, [*start, *points["drop_percent"]], marker="o", label=label)
            low, high = (points[f"drop_{end}"].fill_null(points["drop_percent"]) for end in ("low", "high"))
            middle = points["drop_percent"]
            axes.errorbar(
                x[len(start) :], middle, [middle - low, high - middle], fmt="none", capsize=3, color=drawn.get_color()
            )
        axes.axhline(0, color="grey", linewidth=0.8)
        for majority in rows["majority_percent"].drop_nulls().unique():
            axes.axhline(majority, color="grey", linestyle="--", linewidth=0.8)
            axes.annotate(
                "majority", (1, majority), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="grey"
            )
        axes.set(xlabel="sparsity of the target (%)", title=suite)
        axes.set_ylabel("drop in accuracy (% of dense)" if HEADLINES[metric] else f"rise in {metric} (% of dense)")
        axes.invert_yaxis()
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


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
    choices = run.config["choices"]
    dense = run.id == baseline.id
    report = run.report.get("compression", {})
    sign = 1.0 if HEADLINES[metric] else -1.0
    value, reference = run.metrics[f"{suite}.{metric}"], baseline.metrics[f"{suite}.{metric}"]
    majority = run.metrics.get(f"{suite}.majority")
    return {
        "model": choices["model"],
        "target": "" if dense else choices["target"],
        "compression": choices["compression"],
        "recovery": choices["recovery"],
        "asked_sparsity": None if dense else float(run.config["sparsity"]),
        "suite": suite,
        "metric": metric,
        "value": value,
        "dense": reference,
        "drop_percent": _percent_lost(value, reference, sign),
        **dict.fromkeys(("value_low", "value_high", "drop_low", "drop_high")),
        "majority_percent": None if majority is None else _percent_lost(majority, reference, sign),
        "reached_sparsity": float(report.get("sparsity", 0.0)),
        "bits": float(report.get("bits") or 32.0),
        "stored_mb": run.stored_mb,
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
