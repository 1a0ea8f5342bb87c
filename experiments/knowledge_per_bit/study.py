"""Which compression keeps most facts at equal bytes, and is it the one with the lowest perplexity?

python experiments/knowledge_per_bit/study.py outputs/knowledge_per_bit experiments/knowledge_per_bit

Every finished run of the store is a row: no method is named here. A row's bytes are those of the compressed layers as
stored (codes, scales, zero points, factors of channels, masks) and two for every other parameter, whatever the dense
model's own file is; a head that a method unties counts. Seconds are those of compressing, on whatever machine.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from scipy import stats

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.comparisons import Group, compare, is_dense
from knowledge_compression.analysis.markdown import percent
from knowledge_compression.analysis.marks import panels
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import Estimate, accuracy, mean

MARKER = "<!-- what follows is written by study.py -->"
FACTS, TEXT = "atlas", "perplexity"
OTHER_BYTES = 2.0  # of a parameter that is not compressed
STEP = 0.1  # bits of a compressed weight by which sizes may differ and count as equal


@dataclass(frozen=True)
class Row:
    """One compressed model.

    Attributes:
        name: the settings in which its run differs from the others.
        bits: stored bits of a compressed weight, with everything that decodes it.
        megabytes: of the whole model.
        nats: rise of the mean negative log-likelihood over the dense model's, paired over windows.
        perplexity: of the windows.
        kept: share of the facts that the dense model knows which this one knows.
        flips: share of all facts whose answer turned right or wrong.
        kl: mean divergence from the dense model's distributions on the text, nats a position; None if not measured.
        seconds, gigabytes: of compressing.
    """

    name: str
    bits: float
    megabytes: float
    nats: Estimate
    perplexity: float
    kept: Estimate
    flips: Estimate
    kl: float | None
    seconds: float
    gigabytes: float | None


def windows_of(run: Run) -> pl.DataFrame:
    """Negative log-likelihood of each window."""
    return run.answers(TEXT, "nll").sort("id")


def row_of(group: Group, run: Run, name: str) -> Row:
    """The figures of one run."""
    report = run.report["compression"]
    layers = [LayerReport(**layer) for layer in run.layers]
    stored, weights = sum(layer.stored_bits for layer in layers), sum(layer.parameters for layer in layers)
    paired = windows_of(group.dense).join(windows_of(run), on=["task", "id"], suffix="_here", how="left")
    known = group.correct(group.dense)
    peak = report["peak_memory"]
    return Row(
        name=name,
        bits=stored / max(weights, 1),
        megabytes=(stored / 8 + OTHER_BYTES * (report["model_parameters"] - weights)) / 1e6,
        nats=mean((paired["nll_here"] - paired["nll"]).to_numpy()),
        perplexity=run.metrics[f"{TEXT}.perplexity"],
        kept=accuracy(group.answers(run)[:, known]),
        flips=group.flips[run.id],
        kl=run.metrics.get(f"{TEXT}.kl"),
        seconds=report["seconds"],
        gigabytes=None if peak is None else peak / 1e9,
    )


def rows_of(store: Path) -> list[Row]:
    """Every compressed model of the store, the smallest first."""
    comparisons = compare(list(RunStore(store)))
    groups = [group for group in comparisons if group.asked.suite == FACTS]
    rows = [
        row_of(group, run, comparisons.names.of(run.id))
        for group in groups
        for run in group.runs
        if not is_dense(run) and f"{TEXT}.perplexity" in run.metrics
    ]
    return sorted(rows, key=lambda row: (round(row.megabytes), row.nats.value))


def of_equal_size(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in groups whose compressed weights take as many bits, but for :data:`STEP` from each to the next."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.bits):
        if groups and row.bits - groups[-1][-1].bits <= STEP:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def answer(rows: Sequence[Row]) -> list[str]:
    """At each size, the best by facts and by perplexity, and whether they order the methods alike."""
    lines = []
    for group in of_equal_size(rows):
        if len(group) < 2:
            continue
        by_facts, by_text = max(group, key=lambda row: row.kept.value), min(group, key=lambda row: row.nats.value)
        low, high = group[0].bits, group[-1].bits
        told = f"{by_text.name}, which keeps {percent(by_text.kept)}, has the lowest perplexity"
        told = "it also has the lowest perplexity" if by_facts is by_text else told
        lines.append(f"- {low:.2f} to {high:.2f} bits: {by_facts.name} keeps most, {percent(by_facts.kept)}; {told}.")
        if len(group) > 2:
            order = stats.spearmanr([row.kept.value for row in group], [-row.nats.value for row in group]).statistic
            lines[-1] += f" Over its {len(group)} rows the two orders agree with a rank correlation of {order:.2f}."
    return lines or ["No two rows of equal size yet."]


def best(rows: Sequence[Row]) -> list[Row]:
    """The rows that no smaller one beats by facts (Pareto), the smallest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.megabytes, -row.kept.value)):
        if not front or row.kept.value > front[-1].kept.value:
            front.append(row)
    return front


def draw(rows: Sequence[Row], path: Path) -> None:
    """Facts kept against bytes with the Pareto front, and against the rise of the text's loss."""
    figure: Figure
    figure, (sizes, losses) = panels(2, width=5.4, height=4.4)
    families = defaultdict(list)
    for row in rows:
        families[row.name.split()[0].rpartition("=")[2]].append(row)
    for name, members in families.items():
        kept = np.array([[100 * row.kept.value, 100 * row.kept.low, 100 * row.kept.high] for row in members])
        spread = np.abs(kept[:, 1:] - kept[:, :1]).T
        for axes, x in ((sizes, [r.megabytes for r in members]), (losses, [r.nats.value for r in members])):
            axes.errorbar(x, kept[:, 0], yerr=spread, fmt="o", markersize=4, linewidth=1, label=name)
    front = best(rows)
    sizes.step([r.megabytes for r in front], [100 * r.kept.value for r in front], where="post", color="grey", zorder=0)
    sizes.set(xlabel="stored MB", ylabel="known facts kept (%)", title="grey: most facts at that size or less")
    losses.set(
        xlabel="nats above dense, WikiText-2", xscale="log", ylabel="known facts kept (%)", title="is it perplexity?"
    )
    sizes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def cells(row: Row) -> list[str]:
    """One line of the table."""
    nats = f"{row.nats.value:.3f} [{row.nats.low:.3f}, {row.nats.high:.3f}]"
    kl = "" if row.kl is None else f"{row.kl:.3f}"
    peak = "" if row.gigabytes is None else f"{row.gigabytes:.2f}"
    told = [row.name, f"{row.bits:.2f}", f"{row.megabytes:.1f}", f"{row.perplexity:.4g}", nats, percent(row.kept)]
    return [*told, percent(row.flips), kl, f"{row.seconds:.0f}", peak]


def main(store: Path, folder: Path) -> None:
    """Read the runs under ``store`` and write the study's files into ``folder``."""
    rows = rows_of(store)
    if not rows:
        sys.exit(f"error: {store} holds no compressed model asked for both {FACTS} and {TEXT}; run the preset first")
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    draw(rows, folder / "figures" / "knowledge_per_bit.png")
    heads = ["settings", "bits a weight", "MB", "perplexity", "nats above dense", "known facts kept", "answers flipped"]
    heads += ["KL on the text", "seconds", "peak GB"]
    text = [
        *answer(rows),
        "",
        "![facts by size](figures/knowledge_per_bit.png)",
        "",
        *markdown.table(heads, map(cells, rows)),
    ]
    markdown.write_below(MARKER, text, folder / "README.md")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/knowledge_per_bit/study.py STORE FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
