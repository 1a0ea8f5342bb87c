"""Which compression keeps most facts at equal bytes, and is it the one with the lowest perplexity?

python experiments/knowledge_per_bit/study.py outputs/knowledge_per_bit experiments/knowledge_per_bit --peers DIR

Every finished run of the store is a row: no method is named here. A row's bytes are those of the compressed layers as
stored (codes, scales, zero points, factors of channels, masks) and two for every weight kept as a float and every other
parameter, whatever the dense model's own file is; a head that a method unties counts. Seconds are those of compressing,
on whatever machine.

`--peers` names the folder that `peers.py` filled: the models of other programs, asked in the same way. Their bits are
those of the files that they saved.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy import stats

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.comparisons import Group, compare, is_dense
from knowledge_compression.analysis.markdown import percent
from knowledge_compression.analysis.marks import panels
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.results.files import is_file
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import Estimate, accuracy, mean

MARKER = "<!-- what follows is written by study.py -->"
FACTS, TEXT = "atlas", "perplexity"
OTHER_BYTES = 2.0  # of a parameter that is not compressed, and at most of one that is
STEP = 0.1  # bits of a compressed weight by which sizes may differ and count as equal
GOAL = 0.98  # of the nats above dense of the best other program


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
        seconds, gigabytes: of compressing; no memory is told of other programs.
        peer: whether another program made it.
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
    peer: bool = False


def windows_of(run: Run) -> pl.DataFrame:
    """Negative log-likelihood of each window."""
    return run.answers(TEXT, "nll").sort("id")


def sized(run: Run) -> dict[str, Any]:
    """Bytes and seconds of a run of ours."""
    report = run.report["compression"]
    layers = [LayerReport(**layer | {"bits": min(layer["bits"], 8 * OTHER_BYTES)}) for layer in run.layers]
    stored, weights = sum(layer.stored_bits for layer in layers), sum(layer.parameters for layer in layers)
    peak = report["peak_memory"]
    return {
        "bits": stored / max(weights, 1),
        "megabytes": (stored / 8 + OTHER_BYTES * (report["model_parameters"] - weights)) / 1e6,
        "seconds": report["seconds"],
        "gigabytes": None if peak is None else peak / 1e9,
    }


def sized_by_peer(run: Run, told: dict[str, Any]) -> dict[str, Any]:
    """Bytes of a file that another program saved, and the seconds that it told."""
    report = run.report["compression"]
    file = report["stored"]
    weights = sum(count for kind, count in file["weights"].items() if kind.endswith(" bits"))
    stored = file["layer_bits"] * weights
    return {
        "bits": file["layer_bits"],
        "megabytes": (stored / 8 + OTHER_BYTES * (report["model_parameters"] - weights)) / 1e6,
        "seconds": told["seconds"]["clock"],
        "gigabytes": None,
        "peer": True,
    }


def row_of(group: Group, run: Run, name: str, peers: Path | None) -> Row:
    """The figures of one run; those of another program have a name of their own."""
    if is_file(run):
        told = told_of(run, peers)
        name, size = f"{told['peer']} bits={told['bits']}", sized_by_peer(run, told)
    else:
        method = run.report["compression"]["method"]  # of several parts, e.g. rotate+gptq
        name, size = name.replace(run.config["choices"]["compression"], method, 1), sized(run)
    paired = windows_of(group.dense).join(windows_of(run), on=["task", "id"], suffix="_here", how="left")
    known = group.correct(group.dense)
    return Row(
        name=name,
        nats=mean((paired["nll_here"] - paired["nll"]).to_numpy()),
        perplexity=run.metrics[f"{TEXT}.perplexity"],
        kept=accuracy(group.answers(run)[:, known]),
        flips=group.flips[run.id],
        kl=run.metrics.get(f"{TEXT}.kl"),
        **size,
    )


def told_of(run: Run, peers: Path | None) -> dict[str, Any]:
    """What a peer told beside the file that a run asked."""
    file = run.config["choices"]["compression"]
    place = peers and (peers / file).parent / "told.json"
    if place is None or not place.is_file():
        sys.exit(
            f"error: the run {run.id} asked the file {file}, of which nothing is told; give --peers DIR of peers.py"
        )
    return dict(json.loads(place.read_text()))


def rows_of(store: Path, peers: Path | None = None) -> list[Row]:
    """Every compressed model of the store and of the peers, the smallest first."""
    runs = list(RunStore(store))
    if peers is not None:
        runs += [run for run in RunStore(peers / "store") if is_file(run)]
    comparisons = compare(runs)
    groups = [group for group in comparisons if group.asked.suite == FACTS]
    rows = [
        row_of(group, run, comparisons.names.of(run.id), peers)
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


def against_peers(rows: Sequence[Row]) -> list[str]:
    """At each size of the other programs' models, the best of theirs beside the best of ours that is no larger."""
    lines = []
    for theirs in of_equal_size([row for row in rows if row.peer]):
        size = max(round(row.megabytes) for row in theirs)
        ours = [row for row in rows if not row.peer and round(row.megabytes) <= size]
        if not ours:
            continue
        text, their_text = (min(some, key=lambda row: row.nats.value) for some in (ours, theirs))
        facts, their_facts = (max(some, key=lambda row: row.kept.value) for some in (ours, theirs))
        ratio = text.nats.value / their_text.nats.value
        more = 100 * (facts.kept.value - their_facts.kept.value)
        kept = f"{abs(more):.1f} points {'more' if more > 0 else 'fewer'}" if round(more, 1) else "as many"
        met = "within" if ratio <= GOAL else "above"
        low, high = theirs[0].bits, theirs[-1].bits
        lines.append(
            f"- Other programs, {low:.2f} to {high:.2f} bits: {text.name} is {text.nats.value:.3f} nats above dense, "
            f"{their_text.name}, the best of theirs, {their_text.nats.value:.3f}: {ratio:.2f} times, {met} the goal of "
            f"{GOAL}. {facts.name} keeps {percent(facts.kept)} of the known facts, {their_facts.name}, the best of "
            f"theirs, {percent(their_facts.kept)}: {kept}."
        )
    return lines


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
        family = row.name.rpartition(" ")[0] if row.peer else row.name.split()[0].rpartition("=")[2]
        families[family].append(row)
    colours = colormaps["tab20"].resampled(len(families))
    for place, (name, members) in enumerate(families.items()):
        kept = np.array([[100 * row.kept.value, 100 * row.kept.low, 100 * row.kept.high] for row in members])
        spread = np.abs(kept[:, 1:] - kept[:, :1]).T
        for axes, x in ((sizes, [r.megabytes for r in members]), (losses, [r.nats.value for r in members])):
            mark = "s" if members[0].peer else "o"
            axes.errorbar(
                x, kept[:, 0], yerr=spread, fmt=mark, color=colours(place), markersize=4, linewidth=1, label=name
            )
    front = best(rows)
    sizes.step([r.megabytes for r in front], [100 * r.kept.value for r in front], where="post", color="grey", zorder=0)
    sizes.set(xlabel="stored MB", ylabel="known facts kept (%)", title="squares: other programs; grey: most facts")
    losses.set(
        xlabel="nats above dense, WikiText-2", xscale="log", ylabel="known facts kept (%)", title="is it perplexity?"
    )
    losses.legend(fontsize=7, loc="lower left")
    figure.savefig(path, dpi=110)


def cells(row: Row) -> list[str]:
    """One line of the table."""
    nats = f"{row.nats.value:.3f} [{row.nats.low:.3f}, {row.nats.high:.3f}]"
    kl = "" if row.kl is None else f"{row.kl:.3f}"
    peak = "" if row.gigabytes is None else f"{row.gigabytes:.2f}"
    told = [row.name, f"{row.bits:.2f}", f"{row.megabytes:.1f}", f"{row.perplexity:.4g}", nats, percent(row.kept)]
    return [*told, percent(row.flips), kl, f"{row.seconds:.0f}", peak]


def main(store: Path, folder: Path, peers: Path | None = None) -> None:
    """Read the runs under ``store`` and ``peers`` and write the study's files into ``folder``."""
    rows = rows_of(store, peers)
    if not rows:
        sys.exit(f"error: {store} holds no compressed model asked for both {FACTS} and {TEXT}; run the preset first")
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    draw(rows, folder / "figures" / "knowledge_per_bit.png")
    heads = ["settings", "bits a weight", "MB", "perplexity", "nats above dense", "known facts kept", "answers flipped"]
    heads += ["KL on the text", "seconds", "peak GB"]
    text = [
        *answer(rows),
        *against_peers(rows),
        "",
        "![facts by size](figures/knowledge_per_bit.png)",
        "",
        *markdown.table(heads, map(cells, rows)),
    ]
    markdown.write_below(MARKER, text, folder / "README.md")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("store", type=Path, help="the folder of our runs")
    options.add_argument("folder", type=Path, help="the study's own, for table and figure")
    options.add_argument("--peers", type=Path, help="the folder that peers.py filled")
    given = options.parse_args()
    main(given.store, given.folder, given.peers)
