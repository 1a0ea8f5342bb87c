"""The figures of both papers from any store of runs, as SVG and PDF."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from knowledge_compression.analysis.comparisons import Comparisons, Group
from knowledge_compression.analysis.tables import data_sets
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, accuracy, drop, mean

EVERYTHING, MODULES = ("overall", "all", "att", "ff"), ("self_att", "cross_att", "encoder_att", "decoder_att")


@dataclass(frozen=True)
class DropFigure:
    """A figure of The Cost of Compression: relative drop by target.

    Attributes:
        name: of the file.
        published: which figures of the paper it stands for.
        families: whose models it shows.
        compressions: one line or bar group each.
        targets: one colour each.
        by_data_set: one panel a data set instead of the average over all items.
    """

    name: str
    published: str
    families: tuple[str, ...]
    compressions: tuple[str, ...]
    targets: tuple[str, ...] = EVERYTHING
    by_data_set: bool = False


_FAMILIES = {"encoders": ((ENCODER,), "2, 19", "20-22", "3", "7", "9", "25")} | {
    "decoders": ((DECODER,), "5", "23", "14", "16", "10", "26"),
    "encoder_decoders": ((ENCODER_DECODER,), "6, 12", "24", "15", "17", "13", "27"),
}
DROP_FIGURES: tuple[DropFigure, ...] = (
    *(
        figure
        for name, (family, pruned, pruned_each, int8, both, final, final_each) in _FAMILIES.items()
        for figure in (
            DropFigure(f"pruning_{name}", pruned, family, ("magnitude",)),
            DropFigure(f"pruning_{name}_by_data_set", pruned_each, family, ("magnitude",), by_data_set=True),
            DropFigure(f"int8_{name}", int8, family, ("int8_dynamic",)),
            DropFigure(f"prune_int8_{name}", both, family, ("prune_int8",)),
            DropFigure(f"final_{name}", final, family, ("magnitude", "structured"), ("final",)),
            DropFigure(f"final_{name}_by_data_set", final_each, family, ("magnitude", "structured"), ("final",), True),
        )
    ),
    DropFigure("attention_modules", "8, 11", (ENCODER_DECODER,), ("prune_int8",), MODULES),
    DropFigure("attention_modules_by_data_set", "18", (ENCODER_DECODER,), ("prune_int8",), MODULES, by_data_set=True),
)


def draw(comparisons: Comparisons, folder: Path, *, per_parameter: bool = False) -> list[Path]:
    """Write every figure that the store has runs for.

    Args:
        comparisons: the store's runs beside their baselines.
        folder: where the files go, made when the first one is written.
        per_parameter: divide each drop by the share of the model's parameters that was touched.
    """
    figures: dict[str, Figure] = {}
    for wanted in DROP_FIGURES:
        if figure := drop_figure(comparisons, wanted, per_parameter=per_parameter):
            figures[wanted.name] = figure
    for name, make in RECOVERY_FIGURES.items():
        if figure := make(comparisons):
            figures[name] = figure
    paths = [folder / f"{name}.{suffix}" for name in figures for suffix in ("svg", "pdf")]
    if paths:
        folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        figures[path.stem].savefig(path)
    return paths


def drop_figure(comparisons: Comparisons, wanted: DropFigure, *, per_parameter: bool = False) -> Figure | None:
    """One panel a model and suite (and data set), drop against sparsity, one line a compression and target.

    The band is the 95 % interval of the paired bootstrap; dashed, the drop of always giving the most frequent answer.
    None where the store has no runs for it.
    """
    panels = list(_panels(comparisons, wanted))
    if not panels:
        return None
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, group, lines, mask) in zip(grid, panels, strict=False):
        for label, runs in lines.items():
            shares = [_share_touched(run) if per_parameter else 1.0 for run in runs]
            _line(axes, label, _drops(group, runs, mask), [100 * _sparsity(run) for run in runs], shares)
        majority = group.dense.metrics.get(f"{group.asked.suite}.majority")
        if majority is not None and mask.all() and not per_parameter:
            known = group.dense.metrics[f"{group.asked.suite}.accuracy"]
            axes.axhline(100 * (known - majority) / known if known else 0, color="grey", linestyle="--", linewidth=0.8)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(title=title, xlabel="sparsity of the target (%)", ylabel="drop (% of dense)")
        axes.invert_yaxis()
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid:
        axes.set_visible(False)  # places of the last row that no panel took
    figure.suptitle(f"cf. The Cost of Compression, Figure {wanted.published}", fontsize="small")
    return figure


Panel = tuple[str, Group, Mapping[str, Sequence[Run]], NDArray[np.bool_]]


def _panels(comparisons: Comparisons, wanted: DropFigure) -> Iterator[Panel]:
    for group in comparisons:
        if group.dense.report["model"].get("family") not in wanted.families:
            continue
        lines = {
            f"{target} {compression}" if len(wanted.compressions) > 1 else target: sorted(runs, key=_sparsity)
            for target in wanted.targets
            for compression in wanted.compressions
            if (runs := [run for run in group.runs if _is(run, compression, target)])
        }
        if not lines:
            continue
        everything = np.ones(group.items.height, bool)
        title = f"{group.asked.model}, {group.asked.name}"
        for name, mask in data_sets(group) if wanted.by_data_set else [("", everything)]:
            yield (f"{title}: {name}" if name else title), group, lines, mask


def _drops(group: Group, runs: Sequence[Run], mask: NDArray[np.bool_]) -> list[Estimate]:
    return [drop(group.dense_answers(run)[:, mask], group.answers(run)[:, mask]) for run in runs]


def _line(axes: Axes, label: str, drops: Sequence[Estimate], x: Sequence[float], scale: Sequence[float]) -> None:
    value, low, high = (np.array([getattr(e, part) for e in drops]) / scale for part in ("value", "low", "high"))
    (line,) = axes.plot(x, value, marker="o", markersize=4, label=label)
    if len(x) > 1:
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    else:
        axes.errorbar(x, value, [value - low, high - value], color=line.get_color(), capsize=3)


def accuracy_by_parameters(comparisons: Comparisons) -> Figure | None:
    """Accuracy against the number of trained parameters, one mark a recovery (second paper, Figure 4)."""
    return _scatter(comparisons, _trained, "trained parameters", log=True)


def accuracy_by_perplexity(comparisons: Comparisons) -> Figure | None:
    """Accuracy against perplexity of the same run, one mark a recovery (second paper, Figure 2)."""
    return _scatter(comparisons, _perplexity, "perplexity")


def similarity_by_layer(comparisons: Comparisons) -> Figure | None:
    """Cosine similarity to the dense model by layer, attention and activations (second paper, Figure 5)."""
    runs = [run for group in comparisons for run in group.runs if "similarity.attention" in run.metrics]
    runs = list({run.id: run for run in runs}.values())
    if not runs:
        return None
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("attention", "activation"), strict=True):
        for run in runs:
            layers, cosines = _cosines(run, kind)
            _line(axes, _named(run), cosines, layers, [1.0] * len(layers))
        axes.set(title=kind, xlabel="layer", ylabel="cosine similarity to dense")
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return figure


RECOVERY_FIGURES: Mapping[str, Callable[[Comparisons], Figure | None]] = {
    "accuracy_by_trained_parameters": accuracy_by_parameters,
    "accuracy_by_perplexity": accuracy_by_perplexity,
    "similarity_by_layer": similarity_by_layer,
}


def _trained(run: Run) -> Estimate | None:
    count = float(run.report["recovery"].get("trainable_parameters") or 0)
    return Estimate(count, count, count, 1) if count else None


def _perplexity(run: Run) -> Estimate | None:
    """Of the windows that the run scored, with the interval over them."""
    windows = run.scan_items()
    if "nll" not in windows.collect_schema():
        return None
    losses = windows.filter(pl.col("suite") == "perplexity").select("nll").collect()["nll"].to_numpy()
    return mean(losses, np.exp) if len(losses) else None


def _cosines(run: Run, kind: str) -> tuple[list[int], list[Estimate]]:
    """Layers in forward order, and the mean similarity of each with its interval over windows of text."""
    windows = run.scan_items().filter((pl.col("suite") == "similarity") & (pl.col("task") == kind))
    by_layer = windows.select("layer", "cosine").collect().sort("layer").partition_by("layer", maintain_order=True)
    return [part["layer"][0] for part in by_layer], [mean(part["cosine"].to_numpy()) for part in by_layer]


def _scatter(
    comparisons: Comparisons, x_of: Callable[[Run], Estimate | None], x_label: str, *, log: bool = False
) -> Figure | None:
    groups = [
        (group, marks)
        for group in comparisons
        if any(run.config["choices"]["recovery"] != "none" for run in group.runs)
        and (marks := [(run, x) for run in group.runs if (x := x_of(run)) is not None])
    ]
    if not groups:
        return None
    figure = Figure(figsize=(5.2 * len(groups), 4), layout="constrained")
    for axes, (group, marks) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for run, x in marks:
            y = accuracy(group.answers(run))
            up = [[100 * (y.value - y.low)], [100 * (y.high - y.value)]]
            across = [[x.value - x.low], [x.high - x.value]]
            axes.errorbar([x.value], [100 * y.value], up, across, marker="o", capsize=3, label=_named(run))
        if log:
            axes.set_xscale("log")
        axes.set(title=f"{group.asked.model}, {group.asked.name}", xlabel=x_label, ylabel="accuracy (%)")
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _named(run: Run) -> str:
    choices = run.config["choices"]
    return f"{choices['compression']} {choices['recovery']}"


def _is(run: Run, compression: str, target: str) -> bool:
    choices: Mapping[str, Any] = run.config["choices"]
    return (choices["compression"], choices["target"], choices["recovery"]) == (compression, target, "none")


def _sparsity(run: Run) -> float:
    return float(run.report["compression"].get("sparsity", 0.0))


def _share_touched(run: Run) -> float:
    report = run.report["compression"]
    return float(report["parameters_touched"] / report["model_parameters"])
