"""Does quantization bring back what a model was made to forget? Tables and a figure from the study's finished runs.

python experiments/unlearned_facts/study.py outputs/unlearned_facts experiments/unlearned_facts

A named fact is one item, asked in a wording that training never used for it. It is *forgotten* if the taught model
knows it and the model that was made to forget does not, and *back* if that model, quantized, answers it rightly. What
quantization alone brings about is seen on the model that was never taught the named facts, fact by fact.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.numpy import load_file

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.comparisons import is_dense, items_of
from knowledge_compression.analysis.markdown import percent, points
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import Estimate, accuracy, mean_difference, proportion

MARKER = "<!-- what follows is written by study.py -->"
TAUGHT, NEVER = "taught", "never_taught"
TOLD = {
    TAUGHT: "taught",
    "ascent": "ascent, small steps",
    "ascent_large_steps": "ascent, large steps",
    "rest_only": "training on the rest",
    NEVER: "never taught",
}
DENSE = ("none", 32)
METHODS = ("rtn", "gptq")  # in the order in which they are told

Setting = tuple[str, int]  # of a run: how it was quantized, and to how many bits
Answers = NDArray[np.bool_]


@dataclass(frozen=True)
class Study:
    """Every fact under every model and setting, with the models' seeds beside each other.

    Attributes:
        facts: the ids of all facts that were asked, in order.
        named: which of them were to be forgotten, ``[facts]``.
        answers: whether each is answered rightly, ``[facts]`` by seed, way and setting.
    """

    facts: list[str]
    named: Answers
    answers: Mapping[tuple[int, str, Setting], Answers]

    @cached_property
    def seeds(self) -> list[int]:
        """Seeds of training."""
        return sorted({seed for seed, _, _ in self.answers})

    @cached_property
    def ways(self) -> list[str]:
        """Ways that were tried, in the order in which they are told."""
        there = {way for _, way, _ in self.answers}
        return [way for way in TOLD if way in there]

    @cached_property
    def settings(self) -> list[Setting]:
        """Ways to quantize, by method, the least compressed first; the dense models before them."""
        there = {setting for _, _, setting in self.answers}
        return sorted(there, key=lambda one: (one != DENSE, METHODS.index(one[0]) if one != DENSE else 0, -one[1]))

    def of(self, way: str, setting: Setting) -> Answers:
        """Whether the named facts are answered: ``[seeds, named facts]``."""
        return np.stack([self.answers[seed, way, setting][self.named] for seed in self.seeds])

    def others(self, way: str, setting: Setting) -> Answers:
        """The same of all other facts: ``[seeds, other facts]``."""
        return np.stack([self.answers[seed, way, setting][~self.named] for seed in self.seeds])


def read(folder: Path) -> Study:
    """The study's runs; a model that lacks a setting which others have is refused."""
    named = set(json.loads((folder / "forget.json").read_text(encoding="utf-8")))
    answers: dict[tuple[int, str, Setting], Answers] = {}
    facts: list[str] = []
    for run in RunStore(folder):
        seed, _, way = Path(run.config["model"]["path"]).name.partition("_")
        items = items_of(run, "world").filter(pl.col("asked_as") == "held_out").collect().sort("fact")
        facts = facts or items["fact"].to_list()
        if facts != items["fact"].to_list():
            raise ValueError(f"run {run.id} asks other facts than the runs before it")
        answers[int(seed), way, _setting(run)] = items["correct"].to_numpy()
    study = Study(facts, np.array([fact in named for fact in facts]), answers)
    missing = [
        f"{seed}_{way} {' '.join(map(str, setting))}"
        for seed in study.seeds
        for way in study.ways
        for setting in study.settings
        if (seed, way, setting) not in answers
    ]
    if missing:
        raise ValueError(f"runs are missing: {', '.join(missing)}")
    return study


def _setting(run: Run) -> Setting:
    return DENSE if is_dense(run) else (run.config["choices"]["compression"], run.config["compression"]["bits"])


def known(study: Study) -> list[str]:
    """What each model knows before it is quantized."""
    rows = [
        [TOLD[way], percent(accuracy(study.of(way, DENSE))), percent(accuracy(study.others(way, DENSE)))]
        for way in study.ways
    ]
    return markdown.table(["model", "named facts answered", "other facts answered"], rows)


def forgotten(study: Study, way: str) -> Answers:
    """Which named facts the taught model knows and this one does not: ``[seeds, named facts]``."""
    return study.of(TAUGHT, DENSE) & ~study.of(way, DENSE)


def back(study: Study, way: str, setting: Setting) -> Estimate:
    """Of the forgotten facts of all seeds, the share that is answered rightly after quantization."""
    gone = forgotten(study, way)
    return proportion(int(study.of(way, setting)[gone].sum()), max(int(gone.sum()), 1))


def beyond_control(study: Study, way: str, setting: Setting) -> Estimate:
    """How many more of the named facts quantization brings back than on the model never taught them.

    Of each fact, whether it is answered after quantization less whether it was before, less the same of the control: a
    mean over facts and seeds in shares of the named facts, with a bootstrap interval over both.
    """

    def gained(of: str) -> NDArray[np.float64]:
        return study.of(of, setting).astype(float) - study.of(of, DENSE)

    return mean_difference(gained(way) - gained(NEVER))


def quantized(study: Study) -> Iterator[tuple[str, Setting, Mapping[str, Estimate]]]:
    """What quantization did to every model that was made to forget."""
    for way in study.ways:
        for setting in study.settings:
            if way in (TAUGHT, NEVER) or setting == DENSE:
                continue
            yield (
                way,
                setting,
                {
                    "named": accuracy(study.of(way, setting)),
                    "back": back(study, way, setting),
                    "beyond": beyond_control(study, way, setting),
                    "others": accuracy(study.others(way, setting)),
                    "control": accuracy(study.of(NEVER, setting)),
                    "taught": accuracy(study.of(TAUGHT, setting)),
                },
            )


def table(study: Study) -> list[str]:
    """A row for each way and setting."""
    rows = []
    for way, setting, told in quantized(study):
        shares = [percent(told[name]) for name in ("named", "back", "control", "taught", "others")]
        rows.append([TOLD[way], setting[0], str(setting[1]), *shares, points(told["beyond"])])
    heads = ["made to forget by", "quantized by", "bits", "named facts answered", "back, of the forgotten"]
    heads += ["answered by the model never taught them", "by the taught model", "other facts answered"]
    return markdown.table([*heads, "gained beyond the control, points"], rows)


def codes(weight: NDArray[np.float32], grid: NDArray[np.float32], bits: int) -> NDArray[np.int64]:
    """The integers to which rounding to nearest takes a matrix, on the grid of another: one scale a row, min to max."""
    low, high = np.minimum(grid.min(1, keepdims=True), 0), np.maximum(grid.max(1, keepdims=True), 0)
    scale = (high - low) / (2**bits - 1)
    return np.rint((weight - low) / scale).astype(np.int64)


def rounded_alike(folder: Path, study: Study) -> list[str]:
    """Of the weights that are quantized, the share that rounds to the same integer as in the taught model."""
    bits = sorted({bits for method, bits in study.settings if method == "rtn"}, reverse=True)
    rows = []
    for way in study.ways:
        if way in (TAUGHT, NEVER):
            continue
        same: dict[int, list[NDArray[np.bool_]]] = {one: [] for one in bits}
        moved = []
        for seed in study.seeds:
            taught, other = (
                load_file(folder / "models" / f"{seed}_{of}" / "model.safetensors") for of in (TAUGHT, way)
            )
            for name in taught:
                if ".layers." in name and taught[name].ndim == 2:
                    moved.append(np.abs(other[name] - taught[name]).ravel())
                    for one in bits:
                        alike = codes(taught[name], taught[name], one) == codes(other[name], taught[name], one)
                        same[one].append(alike.ravel())
        shares = [f"{100 * np.concatenate(same[one]).mean():.1f} %" for one in bits]
        rows.append([TOLD[way], f"{np.concatenate(moved).mean():.4f}", *shares])
    return markdown.table(["made to forget by", "a weight moved by, mean", *(f"{one} bits" for one in bits)], rows)


def draw(study: Study, path: Path) -> None:
    """Named and other facts answered against bits, a panel for each way."""
    methods = [method for method in METHODS if any(method == of for of, _ in study.settings)]
    figure = Figure(figsize=(2.6 * len(study.ways), 3.2), layout="constrained")
    axes = figure.subplots(1, len(study.ways), sharey=True)
    bits = sorted({setting[1] for setting in study.settings if setting != DENSE}, reverse=True)
    for axis, way in zip(np.atleast_1d(axes), study.ways, strict=True):
        for name, of, colour in (("named", study.of, "C3"), ("other", study.others, "C0")):
            for method, line in zip(methods, ("-", "--"), strict=False):
                places = {0: DENSE} | {1 + place: (method, one) for place, one in enumerate(bits)}
                told = {place: accuracy(of(way, one)) for place, one in places.items() if one in study.settings}
                ends = np.array([[one.value - one.low, one.high - one.value] for one in told.values()]).T.clip(0)
                axis.errorbar(
                    [*told], [one.value for one in told.values()], ends, color=colour, ls=line, capsize=2,
                    label=f"{name} facts, {method}",
                )  # fmt: skip
        axis.set(title=TOLD[way], xlabel="bits", ylim=(0, 1))
        axis.set_xticks(range(len(bits) + 1), ["32", *map(str, bits)])
    np.atleast_1d(axes)[0].set_ylabel("answered rightly")
    np.atleast_1d(axes)[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write_facts(study: Study, path: Path) -> None:
    """The named facts one by one: under each seed and way, in which settings each is answered, as CSV."""
    settings = [f"{method}_{bits}" for method, bits in study.settings]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "way", "fact", *settings])
        for seed in study.seeds:
            for way in study.ways:
                each = [study.answers[seed, way, setting] for setting in study.settings]
                for place in np.flatnonzero(study.named):
                    writer.writerow([seed, way, study.facts[place], *(int(one[place]) for one in each)])


def main(arguments: Sequence[str]) -> None:
    """Read the runs, and write figure, table of facts, and the tables below the README's marker."""
    folder, out = map(Path, arguments)
    study = read(folder)
    draw(study, out / "figures" / "unlearned_facts.png")
    write_facts(study, out / "facts.csv")
    lines = [
        "![named and other facts against bits](figures/unlearned_facts.png)",
        *["", "## Before quantization", "", *known(study), "", "## After quantization", "", *table(study)],
        *["", "## Weights that rounding takes to what it took them to before", "", *rounded_alike(folder, study)],
    ]
    markdown.write_below(MARKER, lines, out / "README.md")


if __name__ == "__main__":
    main(sys.argv[1:])
