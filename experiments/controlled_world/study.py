"""Tables, figures and findings of the controlled world study, from its finished runs.

python experiments/controlled_world/study.py outputs/controlled_world experiments/controlled_world
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.claims import CLAIMS
from knowledge_compression.analysis.comparisons import Comparisons, Group, compare, items_of
from knowledge_compression.analysis.findings import check
from knowledge_compression.analysis.tables import PaperTable
from knowledge_compression.resampling import CONFIDENCE
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import Estimate, accuracy, drop, proportion

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODELS = {"world_encoder": "encoder", "world_encoder_decoder": "encoder-decoder", "world_decoder": "decoder"}
TARGETS = {"att": "tab:blue", "ff": "tab:orange", "all": "tab:red", "final": "tab:green"}
METHODS = {"magnitude": "o-", "int8_dynamic": "*", "prune_int8": "x--"}
BINS = ("head", "middle", "tail")
MARKER = "<!-- what follows is written by study.py -->"
RESAMPLING: dict[str, Any] = {
    "n_resamples": 2000,
    "vectorized": True,
    "batch": 200,
    "method": "percentile",
    "confidence_level": CONFIDENCE,
}
HELD_OUT = pl.col("asked_as") == "held_out"  # one item a fact, so that items are independent of each other


def main(store: Path, folder: Path) -> None:
    """Read the runs under ``store`` and write the study's files into ``folder``."""
    comparisons = compare([run.only(HELD_OUT) for run in RunStore(store)])
    groups = {group.asked.model: group for group in comparisons if group.asked.model in MODELS}
    missing = sorted(MODELS.keys() - groups.keys())
    if not groups:
        sys.exit(f"error: {store} holds no dense run of {', '.join(missing)}; run the presets first")
    table = PaperTable("results", "Every run.", [row for group in groups.values() for row in rows_of(group)]).frame()
    table.write_csv(folder / "results.csv", float_precision=4)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    plot_drop(table, figures / "drop.png")
    plot_bits(table, figures / "facts_per_bit.png")
    plot_bins(table, figures / "head_and_tail.png")
    text = [f"No runs of {', '.join(missing)}: what follows lacks them.\n"] if missing else []
    text += [*models(groups), *summary(table), *findings(comparisons), *own_findings(groups, table)]
    markdown.write_below(MARKER, text, folder / "README.md")


def rows_of(group: Group) -> Iterator[dict[str, Any]]:
    """One row per run: what was done, the size of the model afterwards, and how much it recalls."""
    dense = group.correct(group.dense)
    facts = items_of(group.dense, group.asked.suite).select("bin", "choices").collect()
    bins = facts["bin"].to_numpy()
    size = group.dense.report["model"]["made"]["parameters"] * 4
    chance = float(np.mean(1 / facts["choices"].to_numpy()))
    for run in [group.dense, *group.runs]:
        kept, choices = group.correct(run), run.config["choices"]
        report = run.report.get("compression", {})
        recall, fall = accuracy(kept), drop(dense, kept)
        stored = int(report.get("stored_bytes") or size)
        yield {
            "model": group.asked.model,
            "compression": choices["compression"],
            "target": choices["target"] if run is not group.dense else "",
            "sparsity": report.get("sparsity") or 0.0,
            "facts": recall.n,
            "recall": recall,
            "drop_percent": fall,
            "mcnemar_p": fall.p,
            **{f"kept_{name}": accuracy(kept[dense & (bins == name)]) for name in BINS},
            "stored_bytes": stored,
        } | worth(recall, chance, stored)


def worth(recall: Estimate, chance: float, stored: int) -> dict[str, Estimate]:
    """The number of facts that a recall stands for, minus those expected from guessing: in all and per kilobyte."""
    known = recall.through(lambda share: (share - chance) / (1 - chance) * recall.n)
    return {"facts_known": known, "facts_per_kilobyte": known.through(lambda facts: facts / stored * 1000)}


def estimate(row: Mapping[str, Any], name: str) -> Estimate:
    """A figure of the table with its interval."""
    value, low, high = (row[name + part] for part in ("", "_low", "_high"))
    return Estimate(value, low, high, row["facts"])


def shown(table: pl.DataFrame) -> list[tuple[str, str]]:
    """The models that there are runs of, with their titles, in the order of :data:`MODELS`."""
    there = set(table["model"])
    return [(model, title) for model, title in MODELS.items() if model in there]


def panels(table: pl.DataFrame) -> tuple[Figure, Sequence[Axes]]:
    """A figure with a panel for each model there are runs of."""
    count = len(shown(table))
    figure, axes = plt.subplots(1, count, figsize=(4.4 * count, 4), sharey=True, squeeze=False)
    return figure, list(axes[0])


def plot_drop(table: pl.DataFrame, path: Path) -> None:
    """Relative drop in recall against sparsity, one panel per family, with 95 % bootstrap bands over facts."""
    figure, axes = panels(table)
    for axis, (model, title) in zip(axes, shown(table), strict=True):
        for target, colour in TARGETS.items():
            part = table.filter(pl.col("model") == model, pl.col("target") == target).sort("sparsity")
            pruned = part.filter(pl.col("compression") == "magnitude")
            axis.plot(pruned["sparsity"], pruned["drop_percent"], "o-", ms=3, color=colour, label=target)
            low, high = pruned["drop_percent_low"], pruned["drop_percent_high"]
            axis.fill_between(pruned["sparsity"], low, high, color=colour, alpha=0.2)
            both = part.filter(pl.col("compression") == "prune_int8")
            marks(axis, both, "sparsity", "drop_percent", fmt="x:", ms=5, color=colour, alpha=0.7)
            quantized = part.filter(pl.col("compression") == "int8_dynamic")
            marks(axis, quantized, "sparsity", "drop_percent", fmt="*", ms=9, color=colour)
        axis.set(title=title, xlabel="share of the target's weights removed")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("drop in recall (% of the dense model's)")
    axes[0].legend(title="target")
    axes[-1].text(0.02, 0.97, "o pruned   x pruned, then int8   * int8", transform=axes[-1].transAxes, va="top", size=8)
    save(figure, path)


def plot_bits(table: pl.DataFrame, path: Path) -> None:
    """Facts known against the bytes of the compressed model, one panel per family."""
    figure, axes = panels(table)
    for axis, (model, title) in zip(axes, shown(table), strict=True):
        part = table.filter(pl.col("model") == model).with_columns(megabytes=pl.col("stored_bytes") / 1e6)
        for target, colour in TARGETS.items():
            for method, style in METHODS.items():
                curve = part.filter(pl.col("target") == target, pl.col("compression") == method).sort("stored_bytes")
                marks(axis, curve, "megabytes", "facts_known", fmt=style, ms=5, color=colour, alpha=0.8)
        marks(axis, part.filter(pl.col("target") == ""), "megabytes", "facts_known", fmt="ks", ms=7)
        axis.set(title=title, xlabel="stored size (MB)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("facts known (guessing taken off)")
    handles = [plt.Line2D([], [], color=colour, label=target) for target, colour in TARGETS.items()]
    names = {"magnitude": "pruned", "int8_dynamic": "int8", "prune_int8": "pruned, int8"}
    handles += [plt.Line2D([], [], color="gray", marker=METHODS[m][0], ls="", label=names[m]) for m in METHODS]
    handles.append(plt.Line2D([], [], color="k", marker="s", ls="", label="dense"))
    axes[-1].legend(handles=handles, fontsize=7)
    save(figure, path)


def plot_bins(table: pl.DataFrame, path: Path) -> None:
    """Share of the dense model's facts still known, by how often training stated them; everything pruned."""
    figure, axes = panels(table)
    chosen = table.filter(pl.col("compression") == "magnitude", pl.col("target") == "all").sort("sparsity")
    for axis, (model, title) in zip(axes, shown(table), strict=True):
        part = chosen.filter(pl.col("model") == model)
        for name, style in zip(BINS, ("-", "--", ":"), strict=True):
            low, value, high = (100 * part[f"kept_{name}{side}"] for side in ("_low", "", "_high"))
            (line,) = axis.plot(part["sparsity"], value, style, marker="o", ms=3, label=name)
            axis.fill_between(part["sparsity"], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="share of attention and feed-forward weights removed")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of the facts that the dense model knew")
    axes[0].legend(title="said in training")
    save(figure, path)


def marks(axis: Axes, part: pl.DataFrame, x: str, y: str, **style: Any) -> None:
    """Points of the table with bars for their 95 % intervals."""
    value, low, high = (part[y + side].to_numpy() for side in ("", "_low", "_high"))
    axis.errorbar(part[x].to_numpy(), value, [value - low, high - value], elinewidth=0.6, **style)


def save(figure: Any, path: Path) -> None:
    """Write a figure and close it."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def models(groups: dict[str, Group]) -> list[str]:
    """What each dense model is and knows: in held-out wordings as asked here, the rest as recorded when it was made."""
    heads = ["model", "facts", "asked", "parameters", "trained (s)"]
    heads += ["head, held-out wording", "tail, held-out", "seen wording", "native"]
    rows = []
    for model, group in groups.items():
        made = group.dense.report["model"]["made"]
        bins = items_of(group.dense, group.asked.suite).select("bin").collect()["bin"].to_numpy()
        recalls = [accuracy(group.correct(group.dense)[bins == name]) for name in ("head", "tail")]
        asked = {"seen": made["asked"], "native.accuracy": int(made["recall"]["items"])}
        recalls += [proportion(round(made["recall"][name] * n), n) for name, n in asked.items()]
        sizes = [f"{made[name]:,}" for name in ("facts", "asked", "parameters")]
        rows.append([MODELS[model], *sizes, f"{made['training']['seconds']:.0f}", *map(markdown.percent, recalls)])
    return ["## The models", "", *markdown.table(heads, rows), ""]


def summary(table: pl.DataFrame) -> list[str]:
    """Recall in held-out wordings by family, target and treatment; all of it is in results.csv."""
    treatments = [("magnitude", share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    treatments += [("int8_dynamic", 0.0), ("prune_int8", 0.2), ("prune_int8", 0.4)]
    names = {"magnitude": "pruned", "int8_dynamic": "int8", "prune_int8": "pruned, int8"}
    heads = [names[method] + (f" {share:.0%}" if share else "") for method, share in treatments]
    rows = []
    for (model, title), target in product(shown(table), TARGETS):
        part = table.filter(pl.col("model") == model, pl.col("target") == target)
        cells = []
        for method, share in treatments:
            found = part.filter(pl.col("compression") == method, (pl.col("sparsity") - share).abs() < 0.02)
            cells.append("".join(markdown.percent(estimate(row, "recall")) for row in found.iter_rows(named=True)))
        rows.append([title, target, *cells])
    return [
        "## Recall after compression",
        "",
        "Share of the facts asked about that are recalled in a held-out wording, with 95 % intervals (Wilson). "
        "`results.csv` has every run.",
        "",
        *markdown.table(["model", "target", *heads], rows),
        "",
        *(f"![{name}](figures/{name}.png)" for name in ("drop", "facts_per_bit", "head_and_tail")),
        "",
    ]


def findings(comparisons: Comparisons) -> list[str]:
    """The first paper's claims, each with what every family shows."""
    claims = [claim for claim in CLAIMS if "Cost of Compression" in claim.source]
    return ["## The first paper's claims", "", *markdown.findings(check(comparisons, claims))]


def own_findings(groups: dict[str, Group], table: pl.DataFrame) -> list[str]:
    """What only a world whose facts are all known can answer."""
    rows = []
    for model, group in groups.items():
        difference = head_minus_tail(group)
        rows.append(
            [
                "Are tail facts lost before head facts? (share kept of what the dense model knew, head minus tail, "
                "mean over sparsities of pruning everything, points)",
                MODELS[model],
                f"{markdown.points(difference)}, p = {difference.p:.2g}",
            ]
        )
    for model, group in groups.items():
        ranks = {target: rank_correlation(group, target) for target in TARGETS}
        said = (f"{target} {rank.value:+.2f} [{rank.low:+.2f}, {rank.high:+.2f}]" for target, rank in ranks.items())
        question = "Does more sparsity hurt more? (rank correlation of recall with sparsity)"
        rows.append([question, MODELS[model], ", ".join(said)])
    for model in groups:
        part = table.filter(pl.col("model") == model)
        best = part.filter(pl.col("target") != "").sort("facts_per_kilobyte", descending=True).row(0, named=True)
        dense = part.filter(pl.col("target") == "").row(0, named=True)
        (kept, recall), (before, known) = (
            (estimate(row, "facts_per_kilobyte"), markdown.percent(estimate(row, "recall"))) for row in (best, dense)
        )
        rows.append(
            [
                "Which setting keeps most facts per kilobyte?",
                MODELS[model],
                f"{best['compression']} of {best['target']} at sparsity {best['sparsity']:.1f}: {kept} facts per kB, "
                f"recall {recall} (dense {before}, {known})",
            ]
        )
    heading = ["", "## What only a controlled world can answer", ""]
    return [*heading, *markdown.table(["question", "model", "answer"], rows)]


def pruned(group: Group, target: str) -> list[tuple[float, NDArray[np.float64]]]:
    """Sparsities and answers of the runs that pruned a target by magnitude, least sparsity first."""
    runs = [run for run in group.runs if _chose(run, "magnitude", target)]
    runs.sort(key=lambda run: run.config["sparsity"])
    return [(run.config["sparsity"], group.correct(run).astype(float)) for run in runs]


def _chose(run: Run, compression: str, target: str) -> bool:
    choices = run.config["choices"]
    return (choices["compression"], choices["target"]) == (compression, target)


def rank_correlation(group: Group, target: str) -> Estimate:
    """Spearman's correlation of recall with sparsity, with a bootstrap interval over facts."""
    sparsities, answers = zip(*pruned(group, target), strict=True)
    order = stats.rankdata(sparsities)[:, None]

    def correlation(*answers: NDArray[np.float64], axis: int) -> Any:
        recalls = np.stack([known.mean(axis=axis) for known in answers]).reshape(len(order), -1)
        return stats.pearsonr(order, stats.rankdata(recalls, axis=0), axis=0).statistic

    found = stats.bootstrap(answers, correlation, paired=True, rng=np.random.default_rng(0), **RESAMPLING)
    (value,), ends = correlation(*answers, axis=-1), found.confidence_interval
    return Estimate(float(value), float(ends.low), float(ends.high), len(answers[0]))


def head_minus_tail(group: Group) -> Estimate:
    """Share of the dense model's facts kept under pruning everything, head minus tail.

    Returns:
        The difference with a bootstrap interval, and its permutation p-value.
    """
    dense = group.correct(group.dense)
    bins = items_of(group.dense, group.asked.suite).select("bin").collect()["bin"].to_numpy()
    kept = np.mean([answers for _, answers in pruned(group, "all")], axis=0)
    head, tail = kept[dense & (bins == "head")], kept[dense & (bins == "tail")]

    def difference(one: NDArray[np.float64], other: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return one.mean(axis=axis) - other.mean(axis=axis)

    ends = stats.bootstrap((head, tail), difference, rng=np.random.default_rng(0), **RESAMPLING).confidence_interval
    p = stats.permutation_test(
        (head, tail), difference, rng=np.random.default_rng(0), n_resamples=2000, vectorized=True, batch=200
    ).pvalue
    value = float(difference(head, tail))
    return Estimate(value, float(ends.low), float(ends.high), len(head) + len(tail), float(p))


def _usage(arguments: Sequence[str]) -> tuple[Path, Path]:
    if len(arguments) != 2:
        sys.exit("usage: python experiments/controlled_world/study.py STORE FOLDER")
    return Path(arguments[0]), Path(arguments[1])


if __name__ == "__main__":
    main(*_usage(sys.argv[1:]))
