"""Facts against derived compositions over all trainings of the controlled world: the tables of the README.

python experiments/facts_or_reasoning/world.py outputs/facts_or_reasoning/world experiments/facts_or_reasoning

``kc report`` checks the claim for each training, which is a model of its own. Here the trainings count as seeds: all of
them were asked the same questions, and each share and interval is over questions and trainings.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowledge_compression.analysis import kinds, markdown
from knowledge_compression.analysis.claims import FACTS, REASONING, Kind
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.markdown import percent, points
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import accuracy

MARKER = "<!-- what follows is written by world.py -->"
TOLD = Kind("told compositions", {"world_two_hop": ("told",)})
NAMES = ("facts", "told", "derived")


@dataclass(frozen=True)
class Training:
    """One training's runs, all asked for facts, told and derived compositions.

    Attributes:
        seed: of the training.
        asked: the questions by :data:`NAMES`.
        runs: what each run is called, and the run.
    """

    seed: int
    asked: Mapping[str, kinds.Asked]
    runs: Mapping[str, Run]

    def table(self, kind: str, runs: Sequence[str]) -> NDArray[np.float64]:
        """What the dense model and these runs, on average, answer above chance: ``[2, 1, questions]``."""
        return self.asked[kind].table([self.runs[name] for name in runs], [0])

    def answered(self, kind: str) -> NDArray[np.bool_]:
        """Whether the dense model answers each question of a kind."""
        asked = self.asked[kind]
        return asked.group.correct(asked.group.dense)[asked.rows]


@dataclass(frozen=True)
class Study:
    """All trainings, whose runs have the same settings."""

    trainings: list[Training]

    @cached_property
    def runs(self) -> list[str]:
        """The settings, in the order of the first training."""
        return list(self.trainings[0].runs)

    def kept(self, kind: str, *runs: str) -> NDArray[np.float64]:
        """:meth:`Training.table` of every training: ``[2, trainings, questions]``."""
        return np.concatenate([training.table(kind, runs) for training in self.trainings], axis=1)


def read(folder: Path) -> Study:
    """The study's runs, by training.

    Raises:
        ValueError: a training lacks a setting that the first one has, or was asked something else.
    """
    comparisons = compare(list(RunStore(folder)))
    order = {run.id: place for place, run in enumerate(sorted(comparisons.runs, key=_order))}
    found = []
    for facts, derived, both in kinds.pairs(comparisons.groups, (FACTS, REASONING)):
        runs = {comparisons.names.of(run.id, ("seed", "eval")): run for run in sorted(both, key=lambda r: order[r.id])}
        asked = {"facts": facts, "told": kinds.asked(derived.group, TOLD), "derived": derived}
        seed = facts.group.dense.config["model"]["training"]["seed"]
        found.append(Training(seed, {name: one for name, one in asked.items() if one}, runs))
    found.sort(key=lambda training: training.seed)
    for training in found:
        if training.runs.keys() != found[0].runs.keys():
            raise ValueError(f"training {training.seed} has not the runs of training {found[0].seed}")
        if any(not _same_questions(training.asked[name], found[0].asked[name]) for name in NAMES):
            raise ValueError(f"training {training.seed} was asked other questions than training {found[0].seed}")
    if not found:
        raise ValueError(f"{folder} has no training that answers facts and derived compositions above chance")
    return Study(found)


def _order(run: Run) -> tuple[Any, ...]:
    compression = run.config["compression"]
    return run.config["choices"]["compression"], compression.get("sparsity") or 0, -(compression.get("bits") or 0)


def _same_questions(one: kinds.Asked, other: kinds.Asked) -> bool:
    return one.group.items.filter(one.rows).equals(other.group.items.filter(other.rows))


def known(study: Study) -> list[str]:
    """What the uncompressed models answer, and what all runs of each keep: a row for each training."""
    rows = []
    for training in study.trainings:
        shares = [f"{100 * training.answered(name).mean():.1f} %" for name in NAMES]
        (effect,) = kinds.differences([(training.table("facts", study.runs), training.table("derived", study.runs))])
        rows.append([str(training.seed), *shares, points(effect), f"{effect.p:.2g}"])
    answered = {name: np.stack([training.answered(name) for training in study.trainings]) for name in NAMES}
    both = study.kept("facts", *study.runs), study.kept("derived", *study.runs)
    (effect,) = kinds.differences([both])
    rows.append(["all", *(percent(accuracy(answered[name])) for name in NAMES), points(effect), f"{effect.p:.2g}"])
    heads = ["training", *(f"{name}, answered by the dense model" for name in NAMES)]
    return markdown.table([*heads, "kept over all runs, facts less derived, points", "p"], rows)


def kept(study: Study) -> list[str]:
    """What is kept of each kind under each compression, over all trainings."""
    shares = kinds.kept([study.kept(name, run) for run in study.runs for name in NAMES])
    both = [[study.kept(name, run) for name in NAMES] for run in study.runs]
    of_facts = kinds.differences([(facts, derived) for facts, _, derived in both], None)
    of_told = kinds.differences([(told, derived) for _, told, derived in both], None)
    rows = [
        [run, *map(percent, shares[3 * place : 3 * place + 3]), points(of_facts[place]), points(of_told[place])]
        for place, run in enumerate(study.runs)
    ]
    averages = [study.kept(name, *study.runs) for name in NAMES]
    each = kinds.differences([(averages[0], averages[2]), (averages[1], averages[2])])
    rows.append(["all", *map(percent, kinds.kept(averages)), *(f"{points(one)}, p {one.p:.2g}" for one in each)])
    heads = ["run", *(f"{name} kept" for name in NAMES)]
    return markdown.table([*heads, "facts less derived, points", "told less derived, points"], rows)


def main(arguments: Sequence[str]) -> None:
    """Read the runs and write the tables below the README's marker."""
    folder, out = map(Path, arguments)
    study = read(folder)
    counts = ", ".join(f"{study.kept(name, study.runs[0]).shape[-1]:,} {name}" for name in NAMES)
    lines = [f"{len(study.trainings)} trainings, each asked the same questions: {counts}. p is not corrected."]
    markdown.write_below(MARKER, [*lines, "", *known(study), "", *kept(study)], out / "README.md")


if __name__ == "__main__":
    main(sys.argv[1:])
