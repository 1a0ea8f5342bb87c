"""The study's tables and its figure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
from answers import BENCHMARKS, FIFTHS, MODELS, PRECISIONS, Answers
from chance import PERMUTATIONS, Overlap, odds, ratio
from numpy.typing import NDArray

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.ledger import LOST
from knowledge_compression.statistics import Estimate, proportion

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SURE = 0.9  # what the publication calls confident


def text_of(answers: Answers, table: pl.DataFrame, unlike: list[str], together: dict[str, Overlap]) -> list[str]:
    """The lines of the page."""
    return [*_counts(table, unlike), *_balance(answers), *_together(answers, together), *_unsure(answers)]


ENDS = {"": "value", "_low": "low", "_high": "high"}  # of columns, and what they hold of an estimate


def _estimate(row: dict[str, Any], name: str) -> Estimate:
    return Estimate(*(row[name + end] for end in ENDS), row["items"])


def _counts(table: pl.DataFrame, unlike: list[str]) -> list[str]:
    heads = ["model", "benchmark", "precision", "accuracy", "change, points", "p", "flips", "all flips"]
    heads += ["kept", "lost", "gained", "other wrong answer"]
    rows = []
    for row in table.iter_rows(named=True):
        flips, every, change = (_estimate(row, name) for name in ("flips", "all_flips", "change"))
        cells = [MODELS[row["model"]], BENCHMARKS[row["benchmark"]], row["precision"], f"{row['accuracy']:.1%}"]
        cells += [markdown.points(change), f"{row['p']:.2g}", markdown.percent(flips), markdown.percent(every)]
        rows.append([*cells, *(str(row[name]) for name in ("kept", "lost", "gained", "wrong_otherwise"))])
    same = (
        "All counts and percentages are those of Table 1 of the publication."
        if not unlike
        else (f"**{len(unlike)} figures are not those of Table 1 of the publication**: {'; '.join(unlike)}.")
    )
    moved = table["p"] < 0.05
    still = table.filter(~moved)["all_flips"]
    summary = (
        f"{same} In {int(moved.sum())} of the {table.height} settings the accuracy changed by McNemar's exact test at "
        f"5 %; in the other {int((~moved).sum())}, {still.min():.1%} to {still.max():.1%} of the answers changed "
        "all the same."
    )
    return ["## Every setting", "", summary, "", *markdown.table(heads, rows), "", "![flips](figures/flips.png)", ""]


def _balance(answers: Answers) -> list[str]:
    rows = []
    for precision in PRECISIONS.values():
        lost, flips = answers.fate[precision] == LOST, answers.flipped(precision)
        per_model = [_share(lost[i], flips[i]) for i in range(len(MODELS))]
        every = ratio(lost, flips, answers)
        rows.append(
            [precision, f"{int(lost.sum())} of {int(flips.sum())}", *map(markdown.percent, [every, *per_model])]
        )
    heads = ["precision", "lost, of flips", "all models", *MODELS.values()]
    sure = []
    for precision in PRECISIONS.values():
        lost = answers.fate[precision] == LOST
        bold = lost & (answers.sure >= SURE)
        per_model = [_share(bold[i], lost[i]) for i in range(len(MODELS))]
        every = ratio(bold, lost, answers)
        sure.append([precision, f"{int(bold.sum())} of {int(lost.sum())}", *map(markdown.percent, [every, *per_model])])
    return [
        "## Which way the flips go, and how sure the lost answers were",
        "",
        "Share of the flips that go from right to wrong (half means an even balance).",
        "",
        *markdown.table(heads, rows),
        "",
        f"Share of the lost answers that the uncompressed model gave with a probability of {SURE} or more.",
        "",
        *markdown.table(["precision", "sure, of lost", *heads[2:]], sure),
        "",
    ]


def _small(p: float | None) -> str:
    return f"= {p:.2g}" if p else "< 1e-300"  # smaller than a float holds


def _share(top: NDArray[np.bool_], bottom: NDArray[np.bool_]) -> Estimate:
    return proportion(int(top.sum()), int(bottom.sum()))


def _together(answers: Answers, together: dict[str, Overlap]) -> list[str]:
    heads = ["", "", *(f"in {k}" for k in range(len(MODELS) + 1)), "pairs", "observed / permuted", "p"]
    rows = []
    for precision, found in together.items():
        rows.append([precision, "observed", *map(str, found.items), str(found.together), "", ""])
        for name, expected, pairs in (
            ("by chance", found.chance, found.pairs[0]),
            ("by chance among equally unsure answers", found.unsure, found.pairs[1]),
        ):
            cells = [f"{pairs.value:.0f} [{pairs.low:.0f}, {pairs.high:.0f}]", f"{found.together / pairs.value:.2f}"]
            cells.append(f"{pairs.p:.2g}")
            rows.append(["", name, *(f"{n:.1f}" for n in expected), *cells])
    alike = []
    for a, b in combinations(range(len(MODELS)), 2):
        one, other = answers.flipped("int4")[[a, b]]
        value = (one & other).sum() / (one.mean() * other.mean() * len(one))
        alike.append((value, f"{list(MODELS.values())[a]} and {list(MODELS.values())[b]} {value:.1f}"))
    least, most = min(alike)[1], max(alike)[1]
    return [
        "## Items that flip in several models at once",
        "",
        f"Number of items (of {answers.items.height:,}) that flip in so many of the five models, next to the mean over "
        f"{PERMUTATIONS:,} permutations of each model's flips: among the items of a benchmark, and among those in the "
        "same twentieth of the model's own confidence on it. Pairs: how many pairs of models flip an item together; "
        "for the permutations, their mean and their middle 95 %. p is two-sided.",
        "",
        *markdown.table(heads, rows),
        "",
        f"Of the pairs of models at int4, flips coincide least and most, relative to chance: {least}; {most}.",
        "",
    ]


def _unsure(answers: Answers) -> list[str]:
    by_fifth, by_hardness = [], []
    for precision in PRECISIONS.values():
        changed = answers.changed[precision]
        fifths = [ratio(changed & (answers.fifth == i), answers.fifth == i, answers) for i in range(FIFTHS)]
        by_fifth.append([precision, *map(markdown.percent, fifths)])
        levels = [answers.others_wrong == k for k in range(len(MODELS))]
        by_hardness.append([precision, *(markdown.percent(ratio(changed & of, of, answers)) for of in levels)])
    regressed = []
    for precision in PRECISIONS.values():
        found = odds(answers, precision)
        cells = [f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}], p {_small(e.p)}" for e in found.values()]
        regressed.append([precision, *cells])
    return [
        "## Unsure, or hard?",
        "",
        "Share of the answers that changed, by the fifth of the uncompressed model's confidence on the benchmark.",
        "",
        *markdown.table(["precision", "least sure", "second", "third", "fourth", "surest"], by_fifth),
        "",
        "The same by how many of the other four uncompressed models are wrong on the item.",
        "",
        *markdown.table(["precision", *(f"{k} wrong" for k in range(len(MODELS)))], by_hardness),
        "",
        "Both at once, in a logistic regression with a level for each model and benchmark, standard errors by item: "
        "odds ratios of a changed answer.",
        "",
        *markdown.table(
            ["precision", "one standard deviation more confidence", "one more of the other models wrong"], regressed
        ),
        "",
    ]


def draw(answers: Answers, table: pl.DataFrame, together: dict[str, Overlap], path: Path) -> None:
    """Flips against the change in accuracy, changed answers by confidence, and flips in several models at once."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2))
    for precision, colour in zip(PRECISIONS.values(), ("tab:blue", "tab:red"), strict=True):
        rows = table.filter(pl.col("precision") == precision)
        ends = [100 * rows[f"all_flips{end}"].to_numpy() for end in ("", "_low", "_high")]
        change = [100 * rows[f"change{end}"].to_numpy() for end in ("", "_low", "_high")]
        bars = {"xerr": _away(change), "yerr": _away(ends), "fmt": "o", "ms": 4, "elinewidth": 0.6}
        left.errorbar(change[0], ends[0], **bars, color=colour, label=precision)
        fifths = range(FIFTHS)
        changed = answers.changed[precision]
        shares = [ratio(changed & (answers.fifth == i), answers.fifth == i, answers) for i in fifths]
        told = [100 * np.array([getattr(e, of) for e in shares]) for of in ("value", "low", "high")]
        middle.errorbar(fifths, told[0], _away(told), color=colour, marker="o", ms=4, capsize=2)
        found, style = together[precision], {"color": colour, "ms": 5}
        several = range(1, len(MODELS) + 1)
        right.plot(several, found.items[1:], "o-", **style)
        right.plot(several, found.chance[1:], "x:", **style)
        right.plot(several, found.unsure[1:], "s--", **style, mfc="none")
    left.axvline(0, color="gray", lw=0.8)
    left.set(xlabel="change in accuracy (points)", ylabel="answers that changed (%)", ylim=(0, None))
    left.legend()
    middle.set(xlabel="confidence of the uncompressed model (fifths)", ylabel="answers that changed (%)")
    middle.set_xticks(range(FIFTHS), ["least", "", "", "", "surest"])
    right.set(xlabel="models in which an item flips", ylabel="items", yscale="symlog", xticks=range(1, 6))
    handles = [plt.Line2D([], [], color="gray", ls=ls, marker=m, mfc=f) for ls, m, f in _LOOKS]
    right.legend(handles, ["observed", "by chance", "by chance among equally unsure"], fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


_LOOKS = (("-", "o", "gray"), (":", "x", "gray"), ("--", "s", "none"))


def _away(ends: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """The lengths of error bars from a value, its lower and its upper end."""
    value, low, high = ends
    return [value - low, high - value]
