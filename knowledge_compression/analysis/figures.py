"""The figures of both papers from any store of runs, as SVG and PDF; this module has the first paper's drops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from knowledge_compression.analysis.comparisons import Comparisons, Group
from knowledge_compression.analysis.marks import level, line, panels
from knowledge_compression.analysis.recovery_figures import RECOVERY_FIGURES
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER
from knowledge_compression.results.drawing import literal_text
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, mean_drops

EVERYTHING, MODULES = ("overall", "all", "att", "ff"), ("self_att", "cross_att", "encoder_att", "decoder_att")


@dataclass(frozen=True)
class DropFigure:
    """A figure of The Cost of Compression: relative drop by target.

    Attributes:
        name: name of the file.
        published: the corresponding figures of the paper.
        families: the families whose models it shows.
        compressions: one line or group of bars each.
        targets: one colour each.
        by_data_set: one panel per data set instead of the average over all items.
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
        folder: where the files are written; created with the first one.
        per_parameter: divide each drop by the share of the model's parameters that was touched.
    """
    with literal_text():
        return _draw(comparisons, folder, per_parameter)


def _draw(comparisons: Comparisons, folder: Path, per_parameter: bool) -> list[Path]:
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
    """One panel per model and suite (and data set): drop against sparsity, one line per compression and target.

    A suite of several data sets is averaged over them with equal weights. The band is the 95 % interval of the paired
    bootstrap; the dashed line is the drop of always giving the most frequent answer (divided like each line, in its
    colour). None if the store has no runs for it.
    """
    found = list(_panels(comparisons, wanted, per_parameter))
    if not found:
        return None
    figure, grid = panels(len(found))
    for axes, (title, group, lines, sets) in zip(grid, found, strict=True):
        majority = _majority(group, sets)
        for label, runs in lines.items():
            shares = [_share_touched(run) if per_parameter else 1.0 for run in runs]
            drawn = line(axes, label, _drops(group, runs, sets), [100 * _sparsity(run) for run in runs], shares)
            if majority and per_parameter:
                level(axes, f"{label}, majority", majority.through(partial(mul, 1 / shares[0])), drawn)
        if majority and not per_parameter:
            level(axes, "majority", majority)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(title=title, xlabel="sparsity of the target (%)")
        mean = f", mean of {len(sets)} data sets" if len(sets) > 1 else ""
        axes.set_ylabel(f"drop (% of dense){mean}{' / share of parameters' if per_parameter else ''}")
        axes.invert_yaxis()
        axes.legend(frameon=False, fontsize="small")
    figure.suptitle(f"cf. The Cost of Compression, Figure {wanted.published}", fontsize="small")
    return figure


Panel = tuple[str, Group, Mapping[str, Sequence[Run]], Sequence[NDArray[np.bool_]]]


def _panels(comparisons: Comparisons, wanted: DropFigure, touched: bool) -> Iterator[Panel]:
    for group in comparisons:
        if group.dense.report["model"].get("family") not in wanted.families:
            continue
        lines = {
            f"{target} {compression}" if len(wanted.compressions) > 1 else target: sorted(runs, key=_sparsity)
            for target in wanted.targets
            for compression in wanted.compressions
            if (runs := [run for run in group.runs if _is(run, compression, target) and (not touched or _counted(run))])
        }
        if not lines:
            continue
        title = f"{group.asked.model}, {group.asked.name}"
        if not wanted.by_data_set:
            yield title, group, lines, group.averaged_over
            continue
        for name, mask in group.data_sets:
            yield f"{title}: {name}", group, lines, [mask]


def _drops(group: Group, runs: Sequence[Run], sets: Sequence[NDArray[np.bool_]]) -> list[Estimate]:
    pairs = [(group.dense_answers(run), group.answers(run)) for run in runs]
    return mean_drops([[(dense[:, mask], right[:, mask]) for mask in sets] for dense, right in pairs])


def _majority(group: Group, sets: Sequence[NDArray[np.bool_]]) -> Estimate | None:
    """The drop of always giving the most frequent answer; None without stored answers or dense accuracy."""
    known = group.correct(group.dense)
    if group.majority is None or not any(known[mask].any() for mask in sets):
        return None
    return mean_drops([[(known[mask], group.majority[mask]) for mask in sets]])[0]


def _is(run: Run, compression: str, target: str) -> bool:
    choices: Mapping[str, Any] = run.config["choices"]
    return (choices["compression"], choices["target"], choices["recovery"]) == (compression, target, "none")


def _sparsity(run: Run) -> float:
    return float(run.report["compression"].get("sparsity", 0.0))


def _counted(run: Run) -> bool:
    """Whether the touched parameters are known, which they are not of a run taken from elsewhere."""
    return "parameters_touched" in run.report["compression"]


def _share_touched(run: Run) -> float:
    report = run.report["compression"]
    return float(report["parameters_touched"] / report["model_parameters"])
