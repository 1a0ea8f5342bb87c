"""The figures of Do Compressed LLMs Forget Knowledge? from any store of runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from knowledge_compression.analysis.comparisons import Comparisons, Group, is_dense
from knowledge_compression.analysis.fates import recoveries
from knowledge_compression.analysis.marks import bars, level, line, panels
from knowledge_compression.analysis.naming import reading_order, recovery_name, recovery_size
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, drops, mean, means

# Figure 1: the compressions it shows, and the setting that varies in each.
_TURNED = {"gptq": "bits", "sparsegpt": "sparsity"}
_NOT_RECOVERED = "not recovered"
_POOLED = ("seed", "eval")  # settings that a panel does not distinguish
_COLOURS = {"lora": "C0", "prompt": "C1", "prefix": "C2", "idp": "C3", "concat": "C4", "none": "grey"}


def accuracy_by_compression(comparisons: Comparisons) -> Figure | None:
    """Average accuracy against the bits of GPTQ and the sparsity of SparseGPT, by calibration text (Figure 1)."""
    found: list[tuple[Group, str, dict[str, list[Run]]]] = []
    for group in comparisons:
        for compression, amount in _TURNED.items():
            runs = [run for run in group.runs if _chose(run, compression=compression, recovery="none")]
            # Of a run taken from elsewhere, the amount may be unknown.
            if runs := [run for run in runs if amount in run.config["compression"]]:
                found.append((group, compression, _by_corpus(runs)))
    if not found:
        return None
    figure, grid = panels(len(found))
    for axes, (group, compression, lines) in zip(grid, found, strict=True):
        level(axes, "dense", group.averages[group.dense.id].through(_percent))
        _lines(group, lines, _turned, axes)
        axes.set(title=f"{group.asked.model}, {group.asked.name}: {compression}", xlabel=_TURNED[compression])
    return _finished(figure, "1")


def accuracy_by_prompt_size(comparisons: Comparisons) -> Figure | None:
    """Average accuracy of IDP against the mean length of its prompts (Figure 6)."""
    found = [(group, bare, runs) for group, bare, runs in _recovered(comparisons, "idp") if len(runs) > 1]
    if not found:
        return None
    figure, grid = panels(len(found))
    for axes, (group, bare, runs) in zip(grid, found, strict=True):
        level(axes, _NOT_RECOVERED, group.averages[bare.id].through(_percent))
        _lines(group, {"idp": list(runs.values())}, lambda run: float(np.mean(recovery_size(run))), axes)
        axes.set(
            title=f"{comparisons.names.of(bare.id, _POOLED)}, {group.asked.name}",
            xlabel="mean length of its prompts (tokens)",
        )
    return _finished(figure, "6")


def improvement_by_data_set(comparisons: Comparisons) -> Figure | None:
    """The gain from joined or selected prompts, in % of the compressed accuracy, by data set (Figure 7)."""
    found = list(_recovered(comparisons, "prompt", "concat", "idp"))
    if not found:
        return None
    figure, grid = panels(len(found), width=7)
    for axes, (group, bare, runs) in zip(grid, found, strict=True):
        names, masks = zip(*group.data_sets, strict=True)
        width = 0.8 / len(runs)
        for i, (name, run) in enumerate(runs.items()):
            falls = drops([(group.correct(bare)[mask], group.correct(run)[mask]) for mask in masks])
            gains = [Estimate(-fall.value, -fall.high, -fall.low, fall.n) for fall in falls]
            bars(axes, name, gains, [place - 0.4 + (i + 0.5) * width for place in range(len(names))], width)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize="small")
        axes.set(
            title=f"{comparisons.names.of(bare.id, _POOLED)}, {group.asked.name}",
            ylabel="gain (% of the compressed model)",
        )
    return _finished(figure, "7", ylabel="")


def similarity_by_layer(comparisons: Comparisons) -> Figure | None:
    """Cosine similarity to the dense model by layer, attention and activations of each compressed model (Figure 5)."""
    found: defaultdict[str, list[Run]] = defaultdict(list)
    for run in comparisons.runs:
        if "similarity.attention" in run.metrics and "similarity" not in run.void and not is_dense(run):
            found[comparisons.names.of(run.id, ("recovery", "eval"))].append(run)
    if not found:
        return None
    kinds = ("attention", "activation")
    figure, grid = panels(len(kinds) * len(found), width=5)
    for axes, (name, kind) in zip(grid, product(found, kinds), strict=True):
        for run in sorted(found[name], key=reading_order):
            layers, cosines = _cosines(run, kind)
            line(axes, _NOT_RECOVERED if _strategy(run) == "none" else recovery_name(run), cosines, layers)
        axes.set(title=f"{name}: {kind}", xlabel="layer")
    return _finished(figure, "5", ylabel="cosine similarity to dense")


def _scatter(
    comparisons: Comparisons, figure: str, x_label: str, x_of: Callable[[Run], Estimate | None], *, log: bool = False
) -> Figure | None:
    """Average accuracy against another quantity of the same run (Figures 2 and 4).

    One panel per compressed model, one colour per recovery, with its size next to each mark.
    """
    found = [
        (group, bare, marks)
        for group, bare, runs in _recovered(comparisons, *_COLOURS)
        if (marks := [(run, x) for run in [bare, *runs.values()] if (x := x_of(run)) is not None])
    ]
    if not found:
        return None
    drawn, grid = panels(len(found), width=5.2, height=4)
    for axes, (group, bare, marks) in zip(grid, found, strict=True):
        level(axes, _NOT_RECOVERED, group.averages[bare.id].through(_percent))
        for run, x in marks:
            y = group.averages[run.id].through(_percent)
            across = [[x.value - x.low], [x.high - x.value]]
            up = [[y.value - y.low], [y.high - y.value]]
            name = _NOT_RECOVERED if run is bare else _strategy(run)
            colour = _COLOURS[_strategy(run)]
            axes.errorbar([x.value], [y.value], up, across, marker="o", capsize=3, color=colour, label=name)
            size = "+".join(map(str, recovery_size(run)))
            axes.annotate(size, (x.value, y.value), (4, 4), textcoords="offset points", fontsize="x-small")
        if log:
            axes.set_xscale("log")
        axes.set(title=f"{comparisons.names.of(bare.id, _POOLED)}, {group.asked.name}", xlabel=x_label)
    return _finished(drawn, figure)


def _trained(run: Run) -> Estimate | None:
    count = float(run.report["recovery"].get("trainable_parameters") or 0)
    return Estimate(count, count, count, 1) if count else None


def _perplexity(run: Run) -> Estimate | None:
    """Perplexity of the windows that the run scored, with the interval over them."""
    windows = run.scan_items()
    if "nll" not in windows.collect_schema():
        return None
    losses = windows.filter(pl.col("suite") == "perplexity").select("nll").collect()["nll"].to_numpy()
    return mean(losses, np.exp) if len(losses) else None


RECOVERY_FIGURES: Mapping[str, Callable[[Comparisons], Figure | None]] = {
    "accuracy_by_compression": accuracy_by_compression,
    "accuracy_by_perplexity": partial(_scatter, figure="2", x_label="perplexity", x_of=_perplexity, log=True),
    "accuracy_by_trained_parameters": partial(
        _scatter, figure="4", x_label="trained parameters", x_of=_trained, log=True
    ),
    "similarity_by_layer": similarity_by_layer,
    "accuracy_by_prompt_size": accuracy_by_prompt_size,
    "improvement_by_data_set": improvement_by_data_set,
}


def _recovered(comparisons: Comparisons, *strategies: str) -> Iterator[tuple[Group, Run, dict[str, Run]]]:
    """Compressed runs (the first seed of each) with their recoveries by these strategies."""
    for group in comparisons:
        for bare, recovered in recoveries(group):
            runs = {name: run for name, run in recovered.items() if run.config["choices"]["recovery"] in strategies}
            if runs and bare in group.runs:
                order = sorted(
                    runs, key=lambda name: (strategies.index(_strategy(runs[name])), recovery_size(runs[name]))
                )
                yield group, bare, {name: runs[name] for name in order}


def _lines(group: Group, lines: Mapping[str, Sequence[Run]], x_of: Callable[[Run], float], axes: Axes) -> None:
    for name, runs in lines.items():
        ordered = sorted(runs, key=x_of)
        line(axes, name, [group.averages[run.id].through(_percent) for run in ordered], [x_of(run) for run in ordered])


def _by_corpus(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        found[f"{run.config['choices']['target']} {run.config['choices'].get('corpus', '')}".strip()].append(run)
    return found


def _cosines(run: Run, kind: str) -> tuple[list[int], list[Estimate]]:
    """Layers in forward order, and the mean similarity of each with its interval over windows of text."""
    windows = run.scan_items().filter((pl.col("suite") == "similarity") & (pl.col("task") == kind))
    by_layer = windows.select("layer", "cosine").collect().sort("layer").partition_by("layer", maintain_order=True)
    return [part["layer"][0] for part in by_layer], means([part["cosine"].to_numpy() for part in by_layer])


def _finished(figure: Figure, published: str, ylabel: str = "average accuracy (%)") -> Figure:
    for axes in figure.axes:
        if axes.get_visible():
            handles, names = axes.get_legend_handles_labels()
            once = dict(zip(names, handles, strict=True))  # several marks of one name
            axes.legend(once.values(), once.keys(), frameon=False, fontsize="small")
            axes.set_ylabel(axes.get_ylabel() or ylabel)
    figure.suptitle(f"cf. Do Compressed LLMs Forget Knowledge?, Figure {published}", fontsize="small")
    return figure


def _turned(run: Run) -> float:
    return float(run.config["compression"][_TURNED[run.config["choices"]["compression"]]])


def _chose(run: Run, **choices: str) -> bool:
    return all(run.config["choices"][key] == value for key, value in choices.items())


def _strategy(run: Run) -> str:
    return str(run.config["choices"]["recovery"])


def _percent(share: float) -> float:
    return 100 * share
