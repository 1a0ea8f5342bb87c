"""Tables, figures and findings of the controlled world study, from its finished runs.

python experiments/controlled_world/study.py outputs/controlled_world experiments/controlled_world
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from knowledge_compression.analysis.comparisons import Comparisons, Group, compare
from knowledge_compression.analysis.findings import check
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import drop, mean_difference

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MODELS = {"world_encoder": "encoder", "world_encoder_decoder": "encoder-decoder", "world_decoder": "decoder"}
TARGETS = {"att": "tab:blue", "ff": "tab:orange", "all": "tab:red", "final": "tab:green"}
METHODS = {"magnitude": "o-", "int8_dynamic": "*", "prune_int8": "x--"}
BINS = ("head", "middle", "tail")
MARKER = "<!-- what follows is written by study.py -->\n"


def main(store: Path, folder: Path) -> None:
    """Read the runs under ``store`` and write the study's files into ``folder``."""
    comparisons = compare([held_out_only(run) for run in RunStore(store)])
    groups = {group.asked.model: group for group in comparisons if group.asked.model in MODELS}
    missing = sorted(MODELS.keys() - groups.keys())
    if not groups:
        sys.exit(f"error: {store} holds no dense run of {', '.join(missing)}; run the presets first")
    table = pl.DataFrame([row for group in groups.values() for row in rows_of(group)])
    table.write_csv(folder / "results.csv", float_precision=4)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    plot_drop(table, figures / "drop.png")
    plot_bits(table, figures / "facts_per_bit.png")
    plot_bins(table, figures / "head_and_tail.png")
    text = [f"No runs of {', '.join(missing)}: what follows lacks them.\n"] if missing else []
    text += [*models(groups), *summary(table), *findings(comparisons), *own_findings(groups, table)]
    readme = folder / "README.md"
    written_by_hand = readme.read_text(encoding="utf-8").partition(MARKER)[0]
    readme.write_text(written_by_hand + MARKER + "\n".join(["", *text]) + "\n", encoding="utf-8")


def held_out_only(run: Run) -> Run:
    """The run with one item a fact, that in a held-out wording, so that items are independent of each other."""
    return replace(run, folder=None, _items=run.items.filter(pl.col("asked_as") == "held_out"))


def rows_of(group: Group) -> Iterator[dict[str, Any]]:
    """One row a run: what was done, how large the model then is, and how much it recalls."""
    dense = group.correct(group.dense)
    bins = group.dense.items.get_column("bin").to_numpy()
    size = group.dense.report["model"]["made"]["parameters"] * 4
    chance = float((1 / group.dense.items["choices"]).mean() or 0.0)
    for run in [group.dense, *group.runs]:
        kept, choices = group.correct(run), run.config["choices"]
        report = run.report.get("compression", {})
        estimate = drop(dense, kept)
        stored = report.get("stored_bytes") or size
        known = (kept.mean() - chance) / (1 - chance) * len(kept)  # what guessing would give taken off
        yield {
            "model": group.asked.model,
            "compression": choices["compression"],
            "target": choices["target"] if run is not group.dense else "",
            "sparsity": report.get("sparsity") or 0.0,
            "recall": float(kept.mean()),
            "drop_percent": estimate.value,
            "drop_low": estimate.low,
            "drop_high": estimate.high,
            "mcnemar_p": estimate.p,
            **{f"kept_{name}": float(kept[dense & (bins == name)].mean()) for name in BINS},
            "stored_bytes": int(stored),
            "facts_known": float(known),
            "facts_per_kilobyte": float(known / stored * 1000),
        }


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
    """Relative drop in recall against sparsity, a panel a family, with 95 % bootstrap bands over facts."""
    figure, axes = panels(table)
    for axis, (model, title) in zip(axes, shown(table), strict=True):
        for target, colour in TARGETS.items():
            part = table.filter(pl.col("model") == model, pl.col("target") == target).sort("sparsity")
            pruned = part.filter(pl.col("compression") == "magnitude")
            axis.plot(pruned["sparsity"], pruned["drop_percent"], "o-", ms=3, color=colour, label=target)
            axis.fill_between(pruned["sparsity"], pruned["drop_low"], pruned["drop_high"], color=colour, alpha=0.2)
            both = part.filter(pl.col("compression") == "prune_int8")
            axis.plot(both["sparsity"], both["drop_percent"], "x:", ms=5, color=colour, alpha=0.7)
            quantized = part.filter(pl.col("compression") == "int8_dynamic")
            axis.plot(quantized["sparsity"], quantized["drop_percent"], "*", ms=9, color=colour)
        axis.set(title=title, xlabel="share of the target's weights removed")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("drop in recall (% of the dense model's)")
    axes[0].legend(title="target")
    axes[-1].text(0.02, 0.97, "o pruned   x pruned, then int8   * int8", transform=axes[-1].transAxes, va="top", size=8)
    save(figure, path)


def plot_bits(table: pl.DataFrame, path: Path) -> None:
    """Facts known against the bytes that the compressed model takes, a panel a family."""
    figure, axes = panels(table)
    for axis, (model, title) in zip(axes, shown(table), strict=True):
        part = table.filter(pl.col("model") == model)
        for target, colour in TARGETS.items():
            for method, style in METHODS.items():
                curve = part.filter(pl.col("target") == target, pl.col("compression") == method).sort("stored_bytes")
                axis.plot(curve["stored_bytes"] / 1e6, curve["facts_known"], style, ms=5, color=colour, alpha=0.8)
        dense = part.filter(pl.col("target") == "")
        axis.plot(dense["stored_bytes"] / 1e6, dense["facts_known"], "ks", ms=7)
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
    """Share of the dense model's facts still known, by how often training said them; everything pruned."""
    figure, axes = panels(table)
    chosen = table.filter(pl.col("compression") == "magnitude", pl.col("target") == "all").sort("sparsity")
    for axis, (model, title) in zip(axes, shown(table), strict=True):
        part = chosen.filter(pl.col("model") == model)
        for name, style in zip(BINS, ("-", "--", ":"), strict=True):
            axis.plot(part["sparsity"], 100 * part[f"kept_{name}"], style, marker="o", ms=3, label=name)
        axis.set(title=title, xlabel="share of attention and feed-forward weights removed")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of the facts that the dense model knew")
    axes[0].legend(title="said in training")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure and forget it."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def models(groups: dict[str, Group]) -> list[str]:
    """What each dense model is and knows, as it was when it was made."""
    lines = [
        "## The models",
        "",
        "| model | facts | asked | parameters | trained (s) | head, held-out wording | tail, held-out | seen wording | "
        "native |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, group in groups.items():
        made = group.dense.report["model"]["made"]
        shares = [made["recall"][name] for name in ("head.held_out", "tail.held_out", "seen", "native.accuracy")]
        lines.append(
            f"| {MODELS[model]} | {made['facts']:,} | {made['asked']:,} | {made['parameters']:,} | "
            f"{made['training']['seconds']:.0f} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |"
        )
    return [*lines, ""]


def summary(table: pl.DataFrame) -> list[str]:
    """Recall in held-out wordings by family, target and treatment, in points; all of it is in results.csv."""
    treatments = [("magnitude", share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    treatments += [("int8_dynamic", 0.0), ("prune_int8", 0.2), ("prune_int8", 0.4)]
    names = {"magnitude": "pruned", "int8_dynamic": "int8", "prune_int8": "pruned, int8"}
    heads = [names[method] + (f" {share:.0%}" if share else "") for method, share in treatments]
    lines = [
        "## Recall after compression",
        "",
        "Share of the facts asked about that are recalled in a held-out wording, in %. `results.csv` has every run.",
        "",
        f"| model | target | {' | '.join(heads)} |",
        f"| --- | --- {'| --- ' * len(heads)}|",
    ]
    for (model, title), target in product(shown(table), TARGETS):
        part = table.filter(pl.col("model") == model, pl.col("target") == target)
        cells = []
        for method, share in treatments:
            row = part.filter(pl.col("compression") == method, (pl.col("sparsity") - share).abs() < 0.02)["recall"]
            cells.append(f"{100 * row[0]:.1f}" if row.len() else "")
        lines.append(f"| {title} | {target} | {' | '.join(cells)} |")
    figures = [f"![{name}](figures/{name}.png)" for name in ("drop", "facts_per_bit", "head_and_tail")]
    return [*lines, "", *figures, ""]


def findings(comparisons: Comparisons) -> list[str]:
    """The first paper's claims, each with what every family shows."""
    claims = [claim for claim in CLAIMS if "Cost of Compression" in claim.source]
    return ["## The first paper's claims", "", *markdown.findings(check(comparisons, claims))]


def own_findings(groups: dict[str, Group], table: pl.DataFrame) -> list[str]:
    """What only a world whose facts are all known can answer."""
    lines = [
        "",
        "## What only a controlled world can answer",
        "",
        "| question | model | answer |",
        "| --- | --- | --- |",
    ]
    for model, group in groups.items():
        difference, p = head_minus_tail(group)
        known = f"{100 * difference.value:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
        lines.append(
            f"| Are tail facts lost before head facts? (share kept of what the dense model knew, head minus tail, "
            f"mean over sparsities of pruning everything, points) | {MODELS[model]} | {known}, p = {p:.2g} |"
        )
    for model in groups:
        correlations = []
        for target in TARGETS:
            part = table.filter(
                pl.col("model") == model, pl.col("target") == target, pl.col("compression") == "magnitude"
            )
            rank = stats.spearmanr(part["sparsity"], part["recall"]).statistic
            correlations.append(f"{target} {rank:+.2f}")
        lines.append(
            f"| Does more sparsity hurt more? (rank correlation of recall with sparsity) | {MODELS[model]} | "
            f"{', '.join(correlations)} |"
        )
    for model in groups:
        part = table.filter(pl.col("model") == model)
        best = part.filter(pl.col("target") != "").sort("facts_per_kilobyte", descending=True).row(0, named=True)
        dense = part.filter(pl.col("target") == "").row(0, named=True)
        lines.append(
            f"| Which setting keeps most facts a kilobyte? | {MODELS[model]} | {best['compression']} of "
            f"{best['target']} at sparsity {best['sparsity']:.1f}: {best['facts_per_kilobyte']:.2f} facts per kB, "
            f"recall {100 * best['recall']:.1f} % (dense {dense['facts_per_kilobyte']:.2f}, "
            f"{100 * dense['recall']:.1f} %) |"
        )
    return lines


def head_minus_tail(group: Group) -> tuple[Any, float]:
    """Share of the dense model's facts kept under pruning everything, head minus tail, with a bootstrap interval.

    Returns:
        The difference and its permutation p-value.
    """
    dense = group.correct(group.dense)
    bins = group.dense.items.get_column("bin").to_numpy()
    runs = [
        run
        for run in group.runs
        if run.config["choices"]["compression"] == "magnitude" and run.config["choices"]["target"] == "all"
    ]
    kept: NDArray[np.float64] = np.mean([group.correct(run) for run in runs], axis=0)
    head, tail = kept[dense & (bins == "head")], kept[dense & (bins == "tail")]

    def difference(one: NDArray[np.float64], other: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        return one.mean(axis=axis) - other.mean(axis=axis)

    options: dict[str, Any] = {"n_resamples": 2000, "vectorized": True, "batch": 200}
    interval = stats.bootstrap(
        (head, tail), difference, method="percentile", rng=np.random.default_rng(0), **options
    ).confidence_interval
    p = stats.permutation_test((head, tail), difference, rng=np.random.default_rng(0), **options).pvalue
    estimate = replace(
        mean_difference(np.zeros(2)),
        value=float(difference(head, tail)),
        low=float(interval.low),
        high=float(interval.high),
        n=len(head) + len(tail),
    )
    return estimate, float(p)


def _usage(arguments: Sequence[str]) -> tuple[Path, Path]:
    if len(arguments) != 2:
        sys.exit("usage: python experiments/controlled_world/study.py STORE FOLDER")
    return Path(arguments[0]), Path(arguments[1])


if __name__ == "__main__":
    main(*_usage(sys.argv[1:]))
