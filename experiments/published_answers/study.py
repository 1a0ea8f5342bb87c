r"""The published answers of five real models, before and after quantization, item by item.

python experiments/published_answers/study.py DIR/quantization_flips outputs/published_answers \\
    experiments/published_answers

The first argument is the folder of the published answers, the second the store into which they are taken, the third
where tables, figure and the lower part of the README go.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl
import statsmodels.api as sm
from numpy.typing import NDArray
from scipy import stats

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.comparisons import KEY, compare, items_of
from knowledge_compression.analysis.flips import change_in_accuracy, flips_of
from knowledge_compression.analysis.ledger import GAINED, LOST, fates
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import Estimate, proportion
from knowledge_compression.take import take_results

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
MARKER = "<!-- what follows is written by study.py -->"
SUITE = "published"
MODELS = {  # smallest first
    "Qwen/Qwen2.5-1.5B-Instruct": "Qwen2.5-1.5B",
    "google/gemma-2-2b-it": "Gemma-2-2B",
    "Qwen/Qwen2.5-3B-Instruct": "Qwen2.5-3B",
    "meta-llama/Llama-3.2-3B-Instruct": "Llama-3.2-3B",
    "microsoft/Phi-3.5-mini-instruct": "Phi-3.5-mini",
}
PRECISIONS = {8.0: "int8", 4.0: "int4"}
BENCHMARKS = {"arc": "ARC-Challenge", "mmlu": "MMLU", "csqa": "CommonsenseQA"}
SURE = 0.9  # what the publication calls confident
FIFTHS, TWENTIETHS = 5, 20  # of the confidence, to show and to deal flips anew in
PERMUTATIONS, RESAMPLES = 1999, 1999


@dataclass(frozen=True)
class Answers:
    """Everything that follows is read from here: arrays ``[models, items]`` over all benchmarks, in one order.

    Attributes:
        items: ``task, id`` of each item.
        known: whether the uncompressed model is right.
        sure: its probability for its answer.
        fate, changed: by precision, the fate of each item and whether the answer is another.
    """

    items: pl.DataFrame
    known: NDArray[np.bool_]
    sure: NDArray[np.float64]
    fate: dict[str, NDArray[np.str_]]
    changed: dict[str, NDArray[np.bool_]]

    @cached_property
    def task(self) -> NDArray[np.str_]:
        """The benchmark of each item."""
        return self.items["task"].to_numpy()

    @cached_property
    def others_wrong(self) -> NDArray[np.int64]:
        """How many of the other uncompressed models are wrong: how hard an item is, whatever this model says."""
        wrong = ~self.known
        return wrong.sum(0) - wrong

    @cached_property
    def fifth(self) -> NDArray[np.int64]:
        """In which fifth of its model's confidence on its benchmark an item is; 0 holds the least sure answers."""
        return self.part(FIFTHS)

    def part(self, parts: int) -> NDArray[np.int64]:
        """In which of equally large parts by its model's confidence on its benchmark an item is."""
        found = np.empty(self.sure.shape, int)
        for task in BENCHMARKS:
            there = self.task == task
            ranks = stats.rankdata(self.sure[:, there], method="ordinal", axis=1) - 1
            found[:, there] = ranks * parts // there.sum()
        return found

    def flipped(self, precision: str) -> NDArray[np.bool_]:
        """Whether each item is a flip: right to wrong, or wrong to right."""
        return np.isin(self.fate[precision], [LOST, GAINED])


def main(data: Path, store: Path, folder: Path) -> None:
    """Take the published answers, and write the study's files into ``folder``."""
    take_results(data, store, HERE / "take.yaml", None, {})
    ledgers = dict(_ledgers(list(RunStore(store))))
    table = counted(ledgers)
    unlike = differences(table, pl.read_csv(HERE / "published" / "table1.csv"))
    answers = arrays(list(RunStore(store)), ledgers)
    table.write_csv(folder / "results.csv", float_precision=4)
    (folder / "figures").mkdir(exist_ok=True)
    together = {p: overlap(answers, answers.flipped(p)) for p in PRECISIONS.values()}
    every = {f"{p}, all flips": overlap(answers, answers.changed[p]) for p in PRECISIONS.values()}
    draw(answers, table, together, folder / "figures" / "flips.png")
    text = [*_counts(table, unlike), *_balance(answers), *_together(answers, together | every), *_unsure(answers)]
    markdown.write_below(MARKER, text, folder / "README.md")


Key = tuple[str, str, str]  # model, precision, benchmark


def _ledgers(runs: Sequence[Run]) -> Iterator[tuple[Key, pl.DataFrame]]:
    """What changed, by model, precision and benchmark."""
    for group in compare(runs):
        for run in group.runs:
            ledger = fates(group.dense, run, SUITE)
            for task in BENCHMARKS:
                precision = PRECISIONS[run.config["compression"]["bits"]]
                yield (group.asked.model, precision, task), ledger.filter(pl.col("task") == task)


def counted(ledgers: dict[Key, pl.DataFrame]) -> pl.DataFrame:
    """One row a model, benchmark and precision: counts, and shares with their intervals."""
    rows = []
    for model in MODELS:
        for task in BENCHMARKS:
            for precision in PRECISIONS.values():
                rows.append(
                    {"model": model, "benchmark": task, "precision": precision} | _row(ledgers[model, precision, task])
                )
    return pl.DataFrame(rows)


def _row(ledger: pl.DataFrame) -> dict[str, Any]:
    found, change = flips_of(ledger), change_in_accuracy(ledger)
    assert found is not None and found.all_flips is not None
    named = {"flips": found.flips, "all_flips": found.all_flips, "change": change}
    shares = {f"{name}{end}": getattr(e, of) for name, e in named.items() for end, of in _ENDS.items()}
    counts = ("items", "kept", "lost", "gained", "wrong_otherwise")
    told = {name: getattr(found, name) for name in counts}
    return told | {"accuracy": (found.kept + found.gained) / found.items} | shares | {"p": change.p}


_ENDS = {"": "value", "_low": "low", "_high": "high"}


def _estimate(row: dict[str, Any], name: str) -> Estimate:
    return Estimate(*(row[name + end] for end in _ENDS), row["items"])


def differences(table: pl.DataFrame, published: pl.DataFrame) -> list[str]:
    """The rows and columns in which our counts are not those published; percentages to the digit that is printed."""
    both = published.join(table, on=["model", "benchmark", "precision"], suffix="_ours", maintain_order="left")
    if both.height != published.height:
        return [f"{published.height - both.height} published rows have no answers"]
    found = []
    for row in both.iter_rows(named=True):
        ours = {name: row[f"{name}_ours"] for name in ("lost", "gained", "wrong_otherwise")}
        shares = {"flips": row["flips_ours"], "all_flips": row["all_flips_ours"], "accuracy": row["accuracy_ours"]}
        shares["fp16_accuracy"] = (row["kept"] + row["lost_ours"]) / row["items"]
        unlike = [name for name, count in ours.items() if count != row[name]]
        unlike += [name for name, share in shares.items() if abs(100 * share - row[name]) > 0.0501]
        found += [f"{row['model']} {row['benchmark']} {row['precision']}: {name}" for name in unlike]
    return found


def arrays(runs: Sequence[Run], ledgers: dict[Key, pl.DataFrame]) -> Answers:
    """The answers of all models side by side.

    Raises:
        ValueError: a model lacks an item.
    """
    dense = {run.config["choices"]["model"]: run for run in runs if run.config["choices"]["compression"] == "none"}
    items = items_of(dense[next(iter(MODELS))], SUITE).select(KEY).collect()
    known, sure = [], []
    for model in MODELS:
        told = items_of(dense[model], SUITE).select(*KEY, "correct", "prediction_log_prob").collect()
        beside = items.join(told, on=KEY, how="left", maintain_order="left")
        if beside["correct"].null_count():
            raise ValueError(f"{model} lacks items")
        known.append(beside["correct"].to_numpy())
        sure.append(np.exp(beside["prediction_log_prob"].to_numpy()))
    fate, changed = {}, {}
    for precision in PRECISIONS.values():
        tables = [pl.concat([ledgers[model, precision, task] for task in BENCHMARKS]) for model in MODELS]
        whole = [items.join(table, on=KEY, how="left", maintain_order="left") for table in tables]
        fate[precision] = np.stack([table["fate"].to_numpy() for table in whole])
        changed[precision] = np.stack([table["changed"].to_numpy() for table in whole])
    return Answers(items, np.stack(known), np.stack(sure), fate, changed)


@dataclass(frozen=True)
class Overlap:
    """In how many models at once items flip, and in how many they would by chance.

    Attributes:
        items: by number of models, 0 to 5, how many items flip in so many.
        chance: the same, mean over permutations of each model's flips among the items of a benchmark.
        unsure: the same among items of the same twentieth of the model's own confidence.
        together: how many pairs of models flip an item together.
        pairs: the same for each of the two kinds of permutation: the mean, the middle 95 %, and the two-sided p-value
            of what is observed.
    """

    items: NDArray[np.int64]
    chance: NDArray[np.float64]
    unsure: NDArray[np.float64]
    together: int
    pairs: tuple[Estimate, Estimate]


def overlap(answers: Answers, flips: NDArray[np.bool_]) -> Overlap:
    """The permutation tests: do flips meet more often than by chance, and than shared unsureness explains?

    Args:
        answers: of all models.
        flips: ``[models, items]`` what counts as a flip.
    """
    task = np.unique(answers.task, return_inverse=True)[1]
    benchmarks = np.broadcast_to(task, flips.shape)
    observed = np.bincount(flips.sum(0), minlength=len(flips) + 1)
    met = int(observed @ PAIRS)
    means, pairs = [], []
    for strata in (benchmarks, benchmarks * TWENTIETHS + answers.part(TWENTIETHS)):
        counts = np.array(list(permuted(flips, strata)))
        together = counts @ PAIRS
        low, high = np.quantile(together, [0.025, 0.975])
        tail = min((together >= met).sum(), (together <= met).sum())
        p = min(1.0, 2 * (1 + tail) / (1 + PERMUTATIONS))
        pairs.append(Estimate(float(together.mean()), float(low), float(high), int(flips.sum()), float(p)))
        means.append(counts.mean(0))
    return Overlap(observed, *means, met, (pairs[0], pairs[1]))


PAIRS = np.array([k * (k - 1) // 2 for k in range(len(MODELS) + 1)])


def permuted(flips: NDArray[np.bool_], strata: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """How many items flip in 0, 1, ... models when each model's flips are dealt anew within its strata."""
    rng = np.random.default_rng(0)
    sorted_places = [np.argsort(row, kind="stable") for row in strata]
    dealt = np.empty_like(flips)
    for _ in range(PERMUTATIONS):
        for model, places in enumerate(sorted_places):
            order = np.lexsort((rng.random(len(places)), strata[model]))  # shuffled within each stratum
            dealt[model, places] = flips[model, order]
        yield np.bincount(dealt.sum(0), minlength=len(flips) + 1)


def resampled(of_item: NDArray[np.float64], answers: Answers) -> tuple[float, float]:
    """The 95 % interval of a ratio of sums over items, items redrawn within their benchmarks.

    Args:
        of_item: ``[2, items]``, numerator and denominator of each item over all models.
    """
    rng = np.random.default_rng(0)
    sums = np.zeros((RESAMPLES, 2))
    for task in BENCHMARKS:
        part = of_item[:, answers.task == task]
        draws = rng.multinomial(part.shape[1], np.full(part.shape[1], 1 / part.shape[1]), size=RESAMPLES)
        sums += draws @ part.T
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(low), float(high)


def ratio(top: NDArray[Any], bottom: NDArray[Any], answers: Answers) -> Estimate:
    """A share over all models, ``[models, items]`` counted, with an interval over items."""
    of_item = np.stack([top.sum(0), bottom.sum(0)]).astype(float)
    low, high = resampled(of_item, answers)
    return Estimate(float(top.sum() / bottom.sum()), low, high, int(bottom.sum()))


def odds(answers: Answers, precision: str) -> dict[str, Estimate]:
    """How the odds of another answer change with confidence and with hardness, each with the other held fixed.

    A logistic regression over all models with one level for each model and benchmark; standard errors by item.

    Returns:
        Odds ratios: for one standard deviation more of (logit) confidence, and for one more model that is wrong.
    """
    models, items = answers.sure.shape
    clipped = np.clip(answers.sure, 0.2501, 1 - 1e-4)
    logit = np.log(clipped / (1 - clipped)).ravel()
    task = np.unique(answers.task, return_inverse=True)[1]
    level = (np.arange(models)[:, None] * len(BENCHMARKS) + task).ravel()
    columns = [(logit - logit.mean()) / logit.std(), answers.others_wrong.ravel()]
    design = np.column_stack([*columns, np.eye(models * len(BENCHMARKS))[level]])
    groups = np.tile(np.arange(items), models)
    fit = sm.Logit(answers.changed[precision].ravel().astype(float), design).fit(
        disp=0, cov_type="cluster", cov_kwds={"groups": groups}
    )
    ends = fit.conf_int()
    return {
        name: Estimate(*map(float, np.exp([fit.params[i], *ends[i]])), items, float(fit.pvalues[i]))
        for i, name in enumerate(("confidence", "hardness"))
    }


def _counts(table: pl.DataFrame, unlike: list[str]) -> list[str]:
    heads = ["model", "benchmark", "precision", "accuracy", "change, points", "p", "flips", "all flips"]
    heads += ["kept", "lost", "gained", "wrong otherwise"]
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
        "Share of the flips that go from right to wrong (half: an even balance).",
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
        f"Number of items (of {answers.items.height:,}) that flip in so many of the five models, beside the mean over "
        f"{PERMUTATIONS:,} permutations of each model's flips: among the items of a benchmark, and among those in the "
        "same twentieth of the model's own confidence on it. Pairs: how many pairs of models flip an item together; "
        "for the permutations, their mean and their middle 95 %. p is two-sided.",
        "",
        *markdown.table(heads, rows),
        "",
        f"Of the pairs of models at int4, the flips meet least and most, over chance: {least}; {most}.",
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
        *markdown.table(["precision", "one standard deviation surer", "one more of the other models wrong"], regressed),
        "",
    ]


def draw(answers: Answers, table: pl.DataFrame, together: dict[str, Overlap], path: Path) -> None:
    """Flips beside the change in accuracy, answers that change by confidence, and flips in several models at once."""
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


def _usage(arguments: Sequence[str]) -> tuple[Path, Path, Path]:
    if len(arguments) != 3:
        sys.exit("usage: python experiments/published_answers/study.py DATA/quantization_flips STORE FOLDER")
    data, store, folder = map(Path, arguments)
    return data, store, folder


if __name__ == "__main__":
    main(*_usage(sys.argv[1:]))
