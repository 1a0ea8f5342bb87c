"""Does calibration on text that states facts keep more of them, and is it the facts or the kind of text?

python experiments/calibration_text/study.py outputs/calibration_text experiments/calibration_text

The text of facts.py *tells* half of the facts. Of the told and of the untold ones that the dense model knows: the share
that each calibration text keeps, and how much more than C4 does, fact by fact and seed by seed. What the told ones gain
beyond the untold ones is the leak.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.comparisons import Group, compare, is_dense, items_of
from knowledge_compression.analysis.markdown import percent, points
from knowledge_compression.analysis.marks import panels
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import Estimate, accuracy, difference_of_means, mean_difference

MARKER = "<!-- what follows is written by study.py -->"
BASE = "c4"  # the text with which the others are compared
TEXTS = {"c4": "C4", "wikitext": "WikiText-2", "text": "sentences that state facts", "mix": "a third of each"}


@dataclass(frozen=True)
class Row:
    """One calibration text, over its seeds.

    Attributes:
        name: what is told of it.
        told, untold: of the known facts that the text of facts.py states, and of the others, the share kept.
        gains: how much more than with :data:`BASE`, of both.
        leak: how much more the told facts gain than the untold ones.
        perplexity: of WikiText-2, the mean over seeds.
    """

    name: str
    told: Estimate
    untold: Estimate
    gains: tuple[Estimate, Estimate]
    leak: Estimate
    perplexity: float


def text_of(run: Run) -> str:
    """The corpus that the user typed."""
    return str(run.config["choices"]["corpus"])


def rows_of(store: Path) -> list[Row]:
    """Every calibration text of the store, in the order of :data:`TEXTS`.

    Raises:
        ValueError: there is no run with :data:`BASE`, or texts were run with other seeds than it.
    """
    (group,) = [group for group in compare(list(RunStore(store))) if group.asked.suite == "atlas"]
    runs = {text_of(run): run for run in group.runs if not is_dense(run)}
    if BASE not in runs:
        raise ValueError(f"{store} has no run with corpus={BASE}, with which the others are compared")
    told_facts = runpy.run_path(str(Path(__file__).with_name("facts.py")))["told_facts"]()
    facts = group.items.join(items_of(group.dense, "atlas").collect(), on=group.items.columns, maintain_order="left")
    told = np.array([fact in told_facts for fact in facts["fact"]])
    known = group.correct(group.dense)
    seeds = group.seeds_of(runs[BASE])
    if odd := [text for text, run in runs.items() if group.seeds_of(run) != seeds]:
        raise ValueError(f"corpus={odd[0]} was run with the seeds {group.seeds_of(runs[odd[0]])}, {BASE} with {seeds}")
    return [row_of(group, runs[text], runs[BASE], known & told, known & ~told) for text in TEXTS if text in runs]


def row_of(group: Group, run: Run, base: Run, told: NDArray[np.bool_], untold: NDArray[np.bool_]) -> Row:
    """The figures of one text."""
    answers = group.answers(run)
    gains = answers.astype(float) - group.answers(base)
    leak = difference_of_means(gains[:, told].mean(0), gains[:, untold].mean(0))
    members = group.seeds.get(run.id, [run])
    return Row(
        name=TEXTS[text_of(run)],
        told=accuracy(answers[:, told]),
        untold=accuracy(answers[:, untold]),
        gains=(mean_difference(gains[:, told]), mean_difference(gains[:, untold])),
        leak=leak,
        perplexity=float(np.mean([member.metrics["perplexity.perplexity"] for member in members])),
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """What is kept of told and of untold facts after each text."""
    figure: Figure
    figure, (axes,) = panels(1, width=6.4, height=3.4)
    for offset, label, chosen in ((-0.12, "told", "told"), (0.12, "untold", "untold")):
        found = [getattr(row, chosen) for row in rows]
        value = np.array([100 * one.value for one in found])
        ends = np.array([[100 * one.low, 100 * one.high] for one in found]).T
        places = np.arange(len(rows)) + offset
        axes.errorbar(places, value, yerr=np.abs(ends - value), fmt="o", markersize=5, label=label)
    axes.set_xticks(range(len(rows)), [row.name for row in rows])
    axes.set(ylabel="known facts kept (%)", xlabel="calibration text")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=110)


def main(store: Path, folder: Path) -> None:
    """Read the runs under ``store`` and write the study's files into ``folder``."""
    rows = rows_of(store)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    draw(rows, folder / "figures" / "calibration_text.png")
    heads = ["calibration text", "perplexity", "told facts kept", "untold facts kept"]
    heads += ["told, more than C4", "untold, more than C4", "leak: told less untold"]
    cells = []
    for row in rows:
        beyond = ["", "", ""] if row.name == TEXTS[BASE] else [*map(points, (*row.gains, row.leak))]
        cells.append([row.name, f"{row.perplexity:.4g}", percent(row.told), percent(row.untold), *beyond])
    text = ["![known facts kept](figures/calibration_text.png)", "", *markdown.table(heads, cells)]
    markdown.write_below(MARKER, text, folder / "README.md")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/calibration_text/study.py STORE FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
