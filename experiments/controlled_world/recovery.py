"""Forgotten or displaced? What each recovery brought back of the facts that compression lost.

python experiments/controlled_world/recovery.py outputs/controlled_world_recovery experiments/controlled_world

The recoveries were trained on text about other entities than the probed ones, so a fact that comes back was still in
the compressed weights. Items are facts in a held-out wording. A lost fact may come back by luck, so what is restored
is set beside what gets lost anew: the *net* is recall gained over recall lost.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import polars as pl
from numpy.typing import NDArray

from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.ledger import REDIRECTION, restorations
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import mcnemar

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STRATEGIES = ("prompt", "prefix", "idp", "lora")


@dataclass
class Case:
    """One compressed model with everything that was tried on it."""

    model: str
    name: str
    dense: NDArray[np.bool_]
    lossy: NDArray[np.bool_]
    recovered: dict[str, NDArray[np.bool_]]
    parameters: dict[str, int]
    by: dict[str, int]  # lost facts by what restored them

    @property
    def lost(self) -> NDArray[np.bool_]:
        return self.dense & ~self.lossy

    def restored(self, strategy: str) -> float:
        """Share of the lost facts that are answered right again."""
        return float(self.recovered[strategy][self.lost].mean())

    def net(self, strategy: str) -> float:
        """Recall gained by the recovery over recall lost by the compression."""
        lost = self.dense.mean() - self.lossy.mean()
        return float((self.recovered[strategy].mean() - self.lossy.mean()) / lost)


def held_out_only(run: Run) -> Run:
    return replace(run, folder=None, _items=run.items.filter(pl.col("asked_as") == "held_out"))


def cases(store: Path) -> list[Case]:
    found = []
    for group in compare([held_out_only(run) for run in RunStore(store)]):
        settings: dict[tuple[str, float], dict[str, Run]] = {}
        for run in group.runs:
            choices = run.config["choices"]
            key = (choices["compression"], float(run.config["sparsity"]))
            settings.setdefault(key, {})[choices["recovery"]] = run
        for (compression, sparsity), runs in sorted(settings.items()):
            if "none" not in runs or len(runs) < 2:
                continue
            tried = {s: runs[s] for s in STRATEGIES if s in runs}
            ledger = restorations(group.dense, runs["none"], tried, group.asked.suite)
            found.append(
                Case(
                    group.asked.model,
                    f"{compression} {sparsity:.0%}",
                    group.correct(group.dense),
                    group.correct(runs["none"]),
                    {s: group.correct(run) for s, run in tried.items()},
                    {s: run.report["recovery"]["trainable_parameters"] for s, run in tried.items()},
                    dict(ledger["restored"].value_counts().iter_rows()),
                )
            )
    return found


def table(found: Sequence[Case]) -> list[str]:
    lines = [
        "| model | compression | recall dense | compressed | recovery | parameters | recall | lost facts restored "
        "| net | p (McNemar) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in found:
        for strategy, correct in case.recovered.items():
            lines.append(
                f"| {case.model} | {case.name} | {case.dense.mean():.3f} | {case.lossy.mean():.3f} | {strategy} "
                f"| {case.parameters[strategy]:,} | {correct.mean():.3f} | {case.restored(strategy):.0%} "
                f"of {case.lost.sum()} | {case.net(strategy):+.0%} | {mcnemar(case.lossy, correct):.2g} |"
            )
    return lines


def origins(found: Sequence[Case]) -> list[str]:
    kinds = ("by redirection", "by weights", "by both", "by neither")
    lines = ["| model | compression | lost facts | " + " | ".join(kinds) + " |", "| --- " * (3 + len(kinds)) + "|"]
    for case in found:
        counts = " | ".join(str(case.by.get(kind, 0)) for kind in kinds)
        lines.append(f"| {case.model} | {case.name} | {case.lost.sum()} | {counts} |")
    return lines


def answer(found: Sequence[Case]) -> list[str]:
    """The plain answer, one line a case, from the figures alone."""
    lines = []
    for case in found:
        best = {
            kind: max(((case.net(s), s) for s in case.recovered if (s in REDIRECTION) == redirects), default=None)
            for kind, redirects in (("redirection", True), ("weights", False))
        }
        said = []
        for kind, top in best.items():
            if top is None:
                continue
            net, strategy = top
            p = mcnemar(case.lossy, case.recovered[strategy])
            change = 100 * float(case.recovered[strategy].mean() - case.lossy.mean())
            if p >= 0.05:
                said.append(
                    f"{kind} ({strategy}) changes recall by {change:+.1f} points, not told from nothing (p = {p:.2g})"
                )
            elif net > 0:
                said.append(
                    f"{kind} ({strategy}) brings back {net:.0%} of the recall that was lost ({change:+.1f} points)"
                )
            else:
                said.append(f"{kind} ({strategy}, the best of its kind) costs a further {-change:.1f} points of recall")
        lines.append(f"- {case.model}, {case.name}: " + "; ".join(said) + ".")
    return lines


def plot(found: Sequence[Case], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(1.6 + 1.5 * len(found), 4))
    colours = {"prompt": "tab:blue", "prefix": "tab:cyan", "idp": "tab:purple", "lora": "tab:orange"}
    for place, case in enumerate(found):
        width = 0.8 / len(case.recovered)
        for i, strategy in enumerate(case.recovered):
            at = place - 0.4 + (i + 0.5) * width
            axis.bar(at, 100 * case.net(strategy), width, color=colours[strategy])
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(len(found)), [f"{c.model.removeprefix('world_')}\n{c.name}" for c in found], fontsize=8)
    axis.set_ylabel("recall brought back (% of the recall lost)")
    axis.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in colours.values()], colours, fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(store: Path, folder: Path) -> None:
    found = cases(store)
    if not found:
        sys.exit(
            f"error: {store} holds no compressed model with a recovery beside it; run the recovery_* presets first"
        )
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    plot(found, folder / "figures" / "recovery.png")
    text = [*table(found), "", "What restored the facts that were lost:", "", *origins(found), "", *answer(found)]
    (folder / "recovery_results.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
