"""Forgotten or displaced? What each recovery brought back of the facts that compression lost.

python experiments/controlled_world/recovery.py outputs/controlled_world_recovery experiments/controlled_world

The recoveries were trained on text about other entities than the probed ones, so a fact that comes back was still in
the compressed weights. Items are facts in a held-out wording. A lost fact may come back by luck, so what is restored
is set beside what gets lost anew: the *net* is recall gained over recall lost.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.fates import RESTORED
from knowledge_compression.analysis.ledger import REDIRECTION, restorations
from knowledge_compression.analysis.markdown import percent, points
from knowledge_compression.resampling import CONFIDENCE
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import Estimate, accuracy, mcnemar, mean_difference, proportion

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STRATEGIES = ("prompt", "prefix", "idp", "lora")
HELD_OUT = pl.col("asked_as") == "held_out"  # one item a fact
Answers = NDArray[np.bool_]


@dataclass
class Case:
    """One compressed model with everything that was tried on it."""

    model: str
    name: str
    dense: Answers
    lossy: Answers
    recovered: dict[str, Answers]
    parameters: dict[str, int]
    by: dict[str, int]  # lost facts by what restored them

    @property
    def lost(self) -> Answers:
        return self.dense & ~self.lossy

    def restored(self, strategy: str) -> Estimate:
        """Share of the lost facts that are answered right again."""
        return accuracy(self.recovered[strategy][self.lost])

    def change(self, strategy: str) -> Estimate:
        """Recall gained by the recovery, or lost."""
        return mean_difference(self.recovered[strategy].astype(float) - self.lossy)

    def net(self, strategy: str) -> Estimate:
        """Recall gained by the recovery over recall lost by the compression, with a bootstrap interval over facts."""
        answers = [known.astype(float) for known in (self.dense, self.lossy, self.recovered[strategy])]
        found = stats.bootstrap(
            answers,
            share_won_back,
            paired=True,
            n_resamples=2000,
            batch=200,
            method="percentile",
            confidence_level=CONFIDENCE,
            rng=np.random.default_rng(0),
        )
        ends = found.confidence_interval
        return Estimate(float(share_won_back(*answers)), float(ends.low), float(ends.high), len(self.dense))


def share_won_back(dense: Any, lossy: Any, recovered: Any, *, axis: int = -1) -> Any:
    return (recovered.mean(axis) - lossy.mean(axis)) / (dense.mean(axis) - lossy.mean(axis))


def cases(store: Path) -> list[Case]:
    found = []
    for group in compare([run.only(HELD_OUT) for run in RunStore(store)]):
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
    heads = ["model", "compression", "recall dense", "compressed", "recovery", "parameters", "recall"]
    heads += ["lost facts restored", "net", "p (McNemar)"]
    rows = []
    for case in found:
        before = [case.model, case.name, percent(accuracy(case.dense)), percent(accuracy(case.lossy))]
        for strategy, correct in case.recovered.items():
            after = [strategy, f"{case.parameters[strategy]:,}", percent(accuracy(correct))]
            after += [f"{percent(case.restored(strategy))} of {case.lost.sum()}", percent(case.net(strategy))]
            rows.append([*before, *after, f"{mcnemar(case.lossy, correct):.2g}"])
    return markdown.table(heads, rows)


def origins(found: Sequence[Case]) -> list[str]:
    rows = []
    for case in found:
        lost = int(case.lost.sum())
        counts = [case.by.get(kind, 0) for kind in RESTORED]
        shares = [f"{count} ({percent(proportion(count, lost))})" for count in counts]
        rows.append([case.model, case.name, str(lost), *shares])
    return markdown.table(["model", "compression", "lost facts", *RESTORED], rows)


def answer(found: Sequence[Case]) -> list[str]:
    """The plain answer, one line a case, from the figures alone."""
    lines = []
    for case in found:
        best = {
            kind: max(
                (strategy for strategy in case.recovered if (strategy in REDIRECTION) == redirects),
                key=lambda strategy: case.recovered[strategy].sum(),
                default=None,
            )
            for kind, redirects in (("redirection", True), ("weights", False))
        }
        said = []
        for kind, strategy in best.items():
            if strategy is None:
                continue
            change, p = points(case.change(strategy)), mcnemar(case.lossy, case.recovered[strategy])
            if p >= 0.05:
                said.append(
                    f"{kind} ({strategy}) changes recall by {change} points, not told from nothing (p = {p:.2g})"
                )
            elif case.change(strategy).value > 0:
                back = percent(case.net(strategy))
                said.append(f"{kind} ({strategy}) brings back {back} of the recall that was lost ({change} points)")
            else:
                said.append(f"{kind} ({strategy}, the best of its kind) changes recall by a further {change} points")
        lines.append(f"- {case.model}, {case.name}: " + "; ".join(said) + ".")
    return lines


def plot(found: Sequence[Case], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(1.6 + 1.5 * len(found), 4))
    colours = {"prompt": "tab:blue", "prefix": "tab:cyan", "idp": "tab:purple", "lora": "tab:orange"}
    for place, case in enumerate(found):
        width = 0.8 / len(case.recovered)
        for i, strategy in enumerate(case.recovered):
            at, change = place - 0.4 + (i + 0.5) * width, case.change(strategy)
            ends = [[100 * (change.value - change.low)], [100 * (change.high - change.value)]]
            axis.bar(at, 100 * change.value, width, yerr=ends, color=colours[strategy], error_kw={"elinewidth": 0.8})
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(len(found)), [f"{c.model.removeprefix('world_')}\n{c.name}" for c in found], fontsize=8)
    axis.set_ylabel("change of recall by the recovery (points)")
    axis.legend([plt.Rectangle((0, 0), 1, 1, color=c) for c in colours.values()], colours, fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(store: Path, folder: Path) -> None:
    found = cases(store)
    if not found:
        sys.exit(f"error: {store} holds no compressed model with a recovery of it; run the recovery_* presets first")
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    plot(found, folder / "figures" / "recovery.png")
    text = [*table(found), "", "What restored the facts that were lost:", "", *origins(found), "", *answer(found)]
    (folder / "recovery_results.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
