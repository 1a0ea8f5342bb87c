"""Which compression keeps most facts at equal bytes, and is it the one with the lowest perplexity?

python experiments/knowledge_per_bit/study.py outputs/knowledge_per_bit experiments/knowledge_per_bit --peers DIR

Every setting of which the store has a finished run is a row: no method is named here. If it was run with several
seeds, the row is the lowest, and a line says how far the others are from it. A row's bytes are those of the compressed
layers as stored (codes, scales, zero points, factors of channels, masks) and two for every weight kept as a float and
every other parameter, whatever the dense model's own file is; a head that a method unties counts. Seconds are those of
compressing, on whatever machine.

`--peers` names the folder that `peers.py` filled: the models of other programs, asked in the same way. Their bits are
those of the files that they saved, or, if they pruned, those of what is not zero there, as for our prunings.

`results.json` in the study's folder keeps every row ever written there. A row of the stores replaces the one of the
same name; the others stay, so that a sweep may be divided over machines. Delete the file to begin anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy import stats

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.comparisons import Group, compare
from knowledge_compression.analysis.markdown import percent
from knowledge_compression.analysis.marks import panels
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.results.files import is_file
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import Estimate, accuracy, mean

RESULTS = "results.json"
MARKER = "<!-- what follows is written by study.py -->"
FACTS = {"atlas": "the atlas", "lama": "LAMA", "bear": "BEAR"}  # what they are called; the first is asked of every row
FIRST, TEXT = "atlas", "perplexity"
OTHER_BYTES = 2.0  # of a parameter that is not compressed, and at most of one that is
STEP = 0.1  # bits of a compressed weight by which sizes may differ and count as equal
GOAL = 0.98  # of the nats above dense of the best other program


@dataclass(frozen=True)
class Row:
    """One compressed model.

    Attributes:
        name: method and size; if others of the store have the same, all settings in which its run differs from them.
        bits: stored bits of a compressed weight, with everything that decodes it.
        megabytes: of the whole model.
        nats: rise of the mean negative log-likelihood over the dense model's, paired over windows.
        perplexity: of the windows.
        kept: share of the facts that the dense model knows which this one knows, by suite of :data:`FACTS`.
        flips: share of the atlas' facts whose answer turned right or wrong.
        kl: mean divergence from the dense model's distributions on the text, nats a position; None if not measured.
        seconds, gigabytes: of compressing; no memory is told of other programs.
        scored_in: the type of the products in scoring, e.g. ``torch.bfloat16``.
        peer: whether another program made it.
    """

    name: str
    bits: float
    megabytes: float
    nats: Estimate
    perplexity: float
    kept: Mapping[str, Estimate]
    flips: Estimate
    kl: float | None
    seconds: float
    gigabytes: float | None
    scored_in: str
    peer: bool = False

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Row:
        """The row of which ``plain`` is :func:`asdict`."""
        kept = {suite: Estimate(**share) for suite, share in plain["kept"].items()}
        return cls(**plain | {"kept": kept, "nats": Estimate(**plain["nats"]), "flips": Estimate(**plain["flips"])})


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
    if "removed" in told:
        weights = told["weights"]
        stored = LayerReport("", "", weights, removed=told["removed"], bits=8 * OTHER_BYTES).stored_bits
    else:
        file = report["stored"]
        weights = sum(count for kind, count in file["weights"].items() if kind.endswith(" bits"))
        stored = file["layer_bits"] * weights
    return {
        "bits": stored / weights,
        "megabytes": (stored / 8 + OTHER_BYTES * (report["model_parameters"] - weights)) / 1e6,
        "seconds": told["seconds"]["clock"],
        "gigabytes": None,
        "peer": True,
    }


def row_of(groups: Mapping[str, Group], run: Run, name: str, peers: Path | None) -> Row:
    """The figures of one run, of which ``groups`` has the comparison by each suite that it was asked.

    Another program's run has a name of its own.
    """
    first = groups[FIRST]
    if is_file(run):
        told = told_of(run, peers)
        made_by = [told["peer"], *([told["method"]] if "method" in told else [])]
        name, size = " ".join([*made_by, *asked_size(told)]), sized_by_peer(run, told)
    else:
        size = sized(run)
    paired = windows_of(first.dense).join(windows_of(run), on=["task", "id"], suffix="_here", how="left")
    return Row(
        name=name,
        nats=mean((paired["nll_here"] - paired["nll"]).to_numpy()),
        perplexity=run.metrics[f"{TEXT}.perplexity"],
        kept={suite: accuracy(of.correct(run)[of.correct(of.dense)]) for suite, of in groups.items()},
        flips=accuracy(first.correct(run) != first.correct(first.dense)),
        kl=run.metrics.get(f"{TEXT}.kl"),
        scored_in=run.environment.get("scored_in") or run.environment["dtype"],
        **size,
    )


def asked_size(settings: Mapping[str, Any]) -> list[str]:
    """The size that was asked for, by the first setting that says it in a method or in a method within it."""
    for key in ("pattern", "bits", "sparsity"):
        if settings.get(key) is not None:
            return [f"{key}={settings[key]}"]
    return next((size for one in settings.values() if isinstance(one, Mapping) and (size := asked_size(one))), [])


def short_name(run: Run) -> str:
    """The parts of a method and the size, e.g. ``rotate+gptq bits=3``: the same in whatever store the run is."""
    return " ".join([run.report["compression"]["method"], *asked_size(run.config["compression"])])


def told_of(run: Run, peers: Path | None) -> dict[str, Any]:
    """What a peer told beside the file that a run asked."""
    file = run.config["choices"]["compression"]
    place = peers and (peers / file).parent / "told.json"
    if place is None or not place.is_file():
        sys.exit(
            f"error: the run {run.id} asked the file {file}, of which nothing is told; give --peers DIR of peers.py"
        )
    return dict(json.loads(place.read_text()))


def has(group: Group, run: Run) -> bool:
    """Whether a run is among those of a group."""
    return any(member.id == run.id for member in group.members)


def rows_of(store: Path, peers: Path | None = None) -> list[list[Row]]:
    """Every compressed model of the store and of the peers, the smallest first; of each the rows of its seeds."""
    runs = list(RunStore(store))
    if peers is not None:
        here = {run.id for run in runs}
        runs += [run for run in RunStore(peers / "store") if run.id not in here]  # theirs, and the dense one if need be
    comparisons = compare(runs)
    asked = {suite: [group for group in comparisons if group.asked.suite == suite] for suite in FACTS}
    settings = [one.seeds[run.id] for one in asked[FIRST] for run in one.runs]
    alike = Counter(short_name(run) for run, *_ in settings)
    rows = []
    for of_setting in settings:
        name = short_name(of_setting[0])
        if alike[name] > 1:  # e.g. with another rate
            name = comparisons.names.of(of_setting[0].id, ("seed", "eval"))
        seeds = []
        for run in of_setting:
            if f"{TEXT}.perplexity" in run.metrics:
                groups = {suite: of for suite in FACTS for of in asked[suite] if has(of, run)}
                seeds.append(row_of(groups, run, name, peers))
        rows += [seeds] if seeds else []
    return ordered(rows)


def ordered(rows: Sequence[list[Row]]) -> list[list[Row]]:
    """The smallest first, and of those the one with the lowest perplexity."""
    return sorted(rows, key=lambda row: (round(row[0].megabytes), row[0].nats.value))


def with_earlier(rows: Sequence[list[Row]], file: Path) -> list[list[Row]]:
    """The rows and those of other names in ``file``, which then holds all of them."""
    try:
        earlier = [[Row.of(row) for row in seeds] for seeds in json.loads(file.read_text())] if file.is_file() else []
        here = {row.name for row, *_ in rows}
        every = ordered([*rows, *(seeds for seeds in earlier if seeds[0].name not in here)])
    except (ValueError, TypeError, LookupError, AttributeError):
        sys.exit(f"error: {file} is not what this study wrote; restore it, or delete it to begin anew")
    scratch = file.with_suffix(".partial")
    scratch.write_text(json.dumps([[asdict(row) for row in seeds] for seeds in every], indent=1) + "\n")
    scratch.replace(file)
    return every


def of_equal_size(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in groups whose compressed weights take as many bits, but for :data:`STEP` from each to the next."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.bits):
        if groups and row.bits - groups[-1][-1].bits <= STEP:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def those_asked(rows: Sequence[Row], suite: str) -> list[Row]:
    """The rows that were asked a suite; those of an older store may not have been."""
    return [row for row in rows if suite in row.kept]


def kept_most(rows: Sequence[Row], suite: str) -> Row:
    """Of the rows that were asked a suite, the one that keeps most of its facts."""
    return max(those_asked(rows, suite), key=lambda row: row.kept[suite].value)


def suites_of(rows: Sequence[Row]) -> list[str]:
    """The suites of facts that all rows were asked."""
    return [suite for suite in FACTS if len(those_asked(rows, suite)) == len(rows)]


def answer(rows: Sequence[Row]) -> list[str]:
    """At each size, the best by each suite of facts and by perplexity, and whether they order the methods alike."""
    lines = []
    for group in of_equal_size(rows):
        if len(group) < 2:
            continue
        by_text = min(group, key=lambda row: row.nats.value)
        told = []
        for suite, name in FACTS.items():
            if asked := those_asked(group, suite):
                first = kept_most(group, suite)
                of = "" if len(asked) == len(group) else f", of {len(asked)} rows that were asked"
                told.append(f"{first.name} keeps most facts of {name} ({percent(first.kept[suite])}{of})")
        told.append(f"{by_text.name} has the lowest perplexity")
        lines.append(f"- {group[0].bits:.2f} to {group[-1].bits:.2f} bits: {'; '.join(told)}.")
        most = max(len(row.kept) for row in group)
        compared = [row for row in group if len(row.kept) == most]
        if len(compared) > 2:
            orders = {FACTS[suite]: [row.kept[suite].value for row in compared] for suite in suites_of(compared)}
            orders["perplexity"] = [-row.nats.value for row in compared]
            pairs = [
                f"{one} and {other} {stats.spearmanr(orders[one], orders[other]).statistic:.2f}"
                for one, other in combinations(orders, 2)
            ]
            lines[-1] += f" Rank correlations over {len(compared)} rows: {', '.join(pairs)}."
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
        ratio = text.nats.value / their_text.nats.value
        told = []
        for suite in FACTS:
            if not (those_asked(ours, suite) and those_asked(theirs, suite)):
                continue
            facts, their_facts = kept_most(ours, suite), kept_most(theirs, suite)
            more = 100 * (facts.kept[suite].value - their_facts.kept[suite].value)
            told.append(
                f"{FACTS[suite]} {100 * facts.kept[suite].value:.1f} % ({facts.name}) and "
                f"{100 * their_facts.kept[suite].value:.1f} % ({their_facts.name}), {more:+.1f} points"
            )
        met = "within" if ratio <= GOAL else "above"
        low, high = theirs[0].bits, theirs[-1].bits
        alike = [row for row in ours if low - STEP <= row.bits <= high + STEP]  # e.g. prunings, for other prunings
        like = min(alike, key=lambda row: row.nats.value, default=text)
        beside = f" ({like.name}, of the same size, {like.nats.value / their_text.nats.value:.2f} times)"
        lines.append(
            f"- Other programs, {low:.2f} to {high:.2f} bits: {text.name} is {text.nats.value:.3f} nats above dense, "
            f"{their_text.name}, the best of theirs, {their_text.nats.value:.3f}: {ratio:.2f} times, {met} the goal of "
            f"{GOAL}{beside if like is not text else ''}. Most facts kept by ours and by theirs: {'; '.join(told)}."
        )
    return lines


def between_seeds(rows: Sequence[Sequence[Row]]) -> list[str]:
    """What the calibration's seed changes, where there are several."""
    lines = []
    for seeds in rows:
        if len(seeds) > 1:
            nats = ", ".join(f"{row.nats.value:.3f}" for row in seeds)
            kept = [
                f"{FACTS[suite]} {', '.join(f'{100 * row.kept[suite].value:.1f}' for row in seeds)} %"
                for suite in suites_of(seeds)
            ]
            lines.append(f"- Seeds of {seeds[0].name}: {nats} nats above dense; {'; '.join(kept)}.")
    return lines


def best(rows: Sequence[Row]) -> list[Row]:
    """The rows that no smaller one beats by the first suite's facts (Pareto), the smallest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.megabytes, -row.kept[FIRST].value)):
        if not front or row.kept[FIRST].value > front[-1].kept[FIRST].value:
            front.append(row)
    return front


def draw(rows: Sequence[Row], path: Path) -> None:
    """Facts kept against bytes with the Pareto front, against the rise of the text's loss, and the other suites'."""
    figure: Figure
    figure, (sizes, losses, others) = panels(3, width=4.9, height=4.6)
    families = defaultdict(list)
    for row in rows:
        family = row.name.rpartition(" ")[0] if row.peer else row.name.split()[0].rpartition("=")[2]
        families[family].append(row)
    colours = colormaps["tab20"].resampled(len(families))
    for place, (name, members) in enumerate(families.items()):
        kept = np.array([percents(row.kept[FIRST]) for row in members])
        spread = np.abs(kept[:, 1:] - kept[:, :1]).T
        look: dict[str, Any] = {"color": colours(place), "markersize": 4, "linewidth": 1}
        mark = "s" if members[0].peer else "o"
        for axes, x in ((sizes, [r.megabytes for r in members]), (losses, [r.nats.value for r in members])):
            axes.errorbar(x, kept[:, 0], yerr=spread, fmt=mark, label=name, **look)
        for suite, filled in (("lama", "full"), ("bear", "none")):
            there = [row for row in members if suite in row.kept]
            x, y = ([100 * row.kept[of].value for row in there] for of in (FIRST, suite))
            others.plot(x, y, mark, fillstyle=filled, **(look | {"linewidth": 0}))
    front = best(rows)
    y = [100 * row.kept[FIRST].value for row in front]
    sizes.step([row.megabytes for row in front], y, where="post", color="grey", zorder=0)
    others.axline((50, 50), slope=1, color="grey", linewidth=0.8, zorder=0)
    sizes.set(xlabel="stored MB", ylabel="known facts of the atlas kept (%)", title="squares: other programs")
    losses.set(xlabel="nats above dense, WikiText-2", xscale="log", title="is it perplexity?")
    others.set(xlabel="of the atlas (%)", ylabel="of LAMA (filled) and BEAR (hollow) (%)", title="is it the suite?")
    losses.legend(fontsize=6, loc="lower left")
    figure.savefig(path, dpi=110)


def percents(estimate: Estimate) -> list[float]:
    """A share and the ends of its interval."""
    return [100 * part for part in (estimate.value, estimate.low, estimate.high)]


HEADS = ["settings", "bits a weight", "MB", "perplexity", "nats above dense"]
HEADS += [f"kept of {name}, %" for name in FACTS.values()]
HEADS += ["answers flipped, %", "KL on the text", "seconds", "peak GB", "scored in"]


def cells(row: Row) -> list[str]:
    """One line of the table."""

    def share(estimate: Estimate | None) -> str:
        return "" if estimate is None else "{:.1f} [{:.1f}, {:.1f}]".format(*percents(estimate))

    nats = f"{row.nats.value:.3f} [{row.nats.low:.3f}, {row.nats.high:.3f}]"
    kl = "" if row.kl is None else f"{row.kl:.3f}"
    peak = "" if row.gigabytes is None else f"{row.gigabytes:.2f}"
    told = [row.name, f"{row.bits:.2f}", f"{row.megabytes:.1f}", f"{row.perplexity:.4g}", nats]
    told += [*(share(row.kept.get(suite)) for suite in FACTS), share(row.flips), kl, f"{row.seconds:.0f}", peak]
    return [*told, row.scored_in.removeprefix("torch.")]


def main(store: Path, folder: Path, peers: Path | None = None) -> None:
    """Read the runs under ``store`` and ``peers`` and write the study's files into ``folder``."""
    seeds = rows_of(store, peers)
    if not seeds:
        sys.exit(f"error: {store} holds no compressed model asked for both {FIRST} and {TEXT}; run the preset first")
    seeds = with_earlier(seeds, folder / RESULTS)
    rows = [row for row, *_ in seeds]
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    draw(rows, folder / "figures" / "knowledge_per_bit.png")
    text = [
        *answer(rows),
        *against_peers(rows),
        *between_seeds(seeds),
        "",
        "![facts by size](figures/knowledge_per_bit.png)",
        "",
        *markdown.table(HEADS, map(cells, rows)),
    ]
    markdown.write_below(MARKER, text, folder / "README.md")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("store", type=Path, help="the folder of our runs")
    options.add_argument("folder", type=Path, help="the study's own, for table and figure")
    options.add_argument("--peers", type=Path, help="the folder that peers.py filled")
    given = options.parse_args()
    main(given.store, given.folder, given.peers)
