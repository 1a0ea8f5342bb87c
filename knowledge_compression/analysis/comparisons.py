"""A store's runs with their dense baselines; only runs of the same protocol are compared."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from knowledge_compression.analysis.measures import ANSWERS, MEASURES, Measure
from knowledge_compression.analysis.protocols import flat, particular
from knowledge_compression.results.files import OTHER_TOKENIZER
from knowledge_compression.results.store import Run
from knowledge_compression.results.varying import Names
from knowledge_compression.results.varying import is_dense as _is_dense
from knowledge_compression.statistics import Estimate, accuracies, drops, macro_accuracies

KEY = ["task", "id"]  # an item of a suite
_PLACES = (
    "path",
    "data_dir",
    "adapter",
    OTHER_TOKENIZER,
)  # paths in runs of format 1; the fingerprint has their content, which decides


_ALONE = "only items that are right or wrong"  # of a suite in which others have shares, as TruthfulQA's mc2 has


@dataclass(frozen=True)
class Asked:
    """What makes two results comparable: the same model, asked the same questions in the same way.

    Attributes:
        model: its name.
        suite: e.g. ``atlas``.
        protocol: short hash of the model's identity, dtype, and the suite's settings and data digests.
        differs: if the store has the same model and suite under several protocols, what distinguishes this one, e.g.
            ``limit=100``; if only some of its items are compared, which; otherwise empty.
    """

    model: str
    suite: str
    protocol: str
    differs: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The suite, with what distinguishes its protocol."""
        return f"{self.suite} ({self.differs})" if self.differs else self.suite


@dataclass
class Group:
    """All runs that can be compared with one dense baseline, for one suite.

    Attributes:
        asked: the protocol that they share.
        dense: the baseline.
        measure: the measure that is compared.
        runs: one run for each setting; with several seeds, that of the lowest.
        seeds: by the id of a run above, that run and those that differ from it only in the seed.
    """

    asked: Asked
    dense: Run
    measure: Measure = ANSWERS
    runs: list[Run] = field(default_factory=list)
    seeds: dict[str, list[Run]] = field(default_factory=dict)
    _read: dict[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    @cached_property
    def items(self) -> pl.DataFrame:
        """Keys of the suite's items in the dense run's order."""
        return _measured(self.dense, self.asked.suite, self.measure).select(KEY).collect()

    @cached_property
    def majority(self) -> NDArray[np.bool_] | None:
        """Whether a task's most frequent answer is right for each item: ``[items]``; None if no answers are stored."""
        items = items_of(self.dense, self.asked.suite)
        if "gold_index" in items.collect_schema():  # if each question has its own choices, the index of the right one
            items = items.with_columns(pl.coalesce(pl.col("gold_index").cast(pl.String), "gold").alias("gold"))
        gold = items.select(*KEY, "gold").collect()
        if gold["gold"].null_count():
            return None
        often = gold.group_by("task").agg(pl.col("gold").mode().sort().first().alias("often"))
        joined = gold.join(often, on="task", how="left", maintain_order="left")
        return (joined["gold"] == joined["often"]).to_numpy()

    @cached_property
    def data_sets(self) -> list[tuple[str, NDArray[np.bool_]]]:
        """The data sets of the suite: name and mask over its items (LAMA's relations grouped by data set)."""
        tasks = self.items["task"].str.split(".").list.first()
        return [(name, (tasks == name).to_numpy()) for name in tasks.unique(maintain_order=True)]

    @property
    def averaged_over(self) -> list[NDArray[np.bool_]]:
        """The items of each data set, if the suite consists of several; otherwise all items."""
        several = {"data_sets", "tasks"} & self.dense.report["eval"][self.asked.suite].keys()
        return [mask for _, mask in self.data_sets] if several else [np.ones(self.items.height, bool)]

    @property
    def settings(self) -> list[Run]:
        """The baseline, then one run for each setting."""
        return [self.dense, *self.runs]

    @cached_property
    def accuracies(self) -> dict[str, Estimate]:
        """Share of all items that is right, by id of :attr:`settings`."""
        return self._each(accuracies([self.answers(run) for run in self.settings]))

    @cached_property
    def averages(self) -> dict[str, Estimate]:
        """Accuracy averaged over the data sets, as the second paper averages its nine, by id of :attr:`settings`."""
        by_data_set = [[self.answers(run)[:, mask] for _, mask in self.data_sets] for run in self.settings]
        return self._each(macro_accuracies(by_data_set))

    @cached_property
    def drops(self) -> dict[str, Estimate]:
        """Relative drop from the baseline over all items, by id of :attr:`settings`."""
        return self._each(drops([(self.dense_answers(run), self.answers(run)) for run in self.settings]))

    @cached_property
    def flips(self) -> dict[str, Estimate]:
        """Share of all items that went from right to wrong or from wrong to right, by id of :attr:`settings`."""
        return self._each(accuracies([self.flipped(run) for run in self.settings]))

    def _each(self, estimates: Sequence[Estimate]) -> dict[str, Estimate]:
        return {run.id: estimate for run, estimate in zip(self.settings, estimates, strict=True)}

    @property
    def members(self) -> list[Run]:
        """Every run of every seed, the dense ones first."""
        return [member for run in self.settings for member in self.seeds.get(run.id, [run])]

    def correct(self, run: Run) -> NDArray[np.bool_]:
        """Whether ``run`` answers each item right: ``[items]``, in the order of :attr:`items`.

        Raises:
            ValueError: the run lacks items that its baseline has.
        """
        return self._values(run).astype(bool)

    def gains(self, run: Run) -> NDArray[np.float64]:
        """The value of :attr:`measure` for each item of ``run``, higher is better: ``[items]``."""
        return self.measure.gain(self._values(run))

    def _values(self, run: Run) -> NDArray[Any]:
        if run.id not in self._read:
            column = self.measure.column
            found = _measured(run, self.asked.suite, self.measure).collect()
            aligned = self.items.join(found, on=KEY, how="left", maintain_order="left")[column]
            if aligned.null_count():
                raise ValueError(f"{aligned.null_count()} items that its baseline answers are missing")
            self._read[run.id] = aligned.to_numpy()
        return self._read[run.id]

    def under(self, run: Run, seed: int | None) -> Run:
        """The run of a setting with that seed, or its first run if there is none."""
        members = {member.config["seed"]: member for member in self.seeds.get(run.id, [run])}
        return members.get(seed, run)

    def seeds_of(self, run: Run) -> list[int | None]:
        """The seeds with which a setting was run; None for a setting without randomness."""
        return [member.config["seed"] for member in self.seeds.get(run.id, [run])]

    def answers(self, run: Run) -> NDArray[np.bool_]:
        """Whether each item was right under each seed of a setting: ``[seeds, items]``."""
        return np.stack([self.correct(self.under(run, seed)) for seed in self.seeds_of(run)])

    def flipped(self, run: Run) -> NDArray[np.bool_]:
        """Whether each item's answer is right and the baseline's wrong, or conversely: ``[seeds, items]``."""
        return self.answers(run) != self.correct(self.dense)

    def changed(self, run: Run) -> NDArray[np.bool_] | None:
        """:meth:`flipped`, or wrong in two different ways; None if some wrong answers are not known as text."""
        before = self._said(self.dense)
        other = [self._said(self.under(run, seed)) != before for seed in self.seeds_of(run)]
        wrong = ~self.answers(run) & ~self.correct(self.dense)
        if (wrong & np.stack([one.is_null() for one in other])).any():
            return None
        return self.flipped(run) | (wrong & np.stack([one.fill_null(value=False) for one in other]))

    def _said(self, run: Run) -> pl.Series:
        """The answer of ``run`` to each item."""
        said = items_of(run, self.asked.suite).select(*KEY, "prediction").collect()
        return self.items.join(said, on=KEY, how="left", maintain_order="left")["prediction"]

    def dense_answers(self, run: Run) -> NDArray[np.bool_]:
        """The baseline's answers for the seeds of :meth:`answers`: with the same seed if it was run with it."""
        return np.stack([self.correct(self.under(self.dense, seed)) for seed in self.seeds_of(run)])


@dataclass
class Comparisons:
    """Everything in a store that can be compared, and what cannot, with reasons.

    Attributes:
        groups: one for each model, suite and protocol with a dense run and questions with right answers.
        measured: the same for suites whose items have values instead of right answers.
        skipped: ids of the runs left out, with reasons.
        runs: all runs given, for statements about single runs.
    """

    groups: list[Group]
    measured: list[Group]
    skipped: list[tuple[str, str]]
    runs: Sequence[Run]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    @cached_property
    def names(self) -> Names:
        """What the runs are called."""
        return Names({run.id: run.config for run in self.runs})


def compare(runs: Sequence[Run]) -> Comparisons:
    """Sort runs into groups that share a dense baseline, and the runs of a group by setting.

    Args:
        runs: finished runs, in any order.
    """
    by_question: dict[Asked, list[Run]] = defaultdict(list)
    said: dict[Asked, dict[str, str]] = {}
    skipped: list[tuple[str, str]] = []
    for run in runs:
        for suite in run.config["eval"]:
            if why := run.void.get(suite):
                skipped.append((run.id, f"{why}, so {suite} has no valid result"))
                continue
            deciding = _deciding(run, suite)
            asked = Asked(run.config["choices"]["model"], suite, _digest(deciding))
            by_question[asked].append(run)
            said.setdefault(asked, dict(flat(deciding)))
    groups: list[Group] = []
    measured: list[Group] = []
    for asked in sorted(by_question, key=lambda asked: (asked.model, asked.suite, asked.protocol)):
        rivals = [said[other] for other in said if (other.model, other.suite) == (asked.model, asked.suite)]
        named = Asked(asked.model, asked.suite, asked.protocol, particular(said[asked], rivals))
        members = sorted(by_question[asked], key=lambda run: run.config["seed"] or 0)
        dense = list({run.config["seed"]: run for run in members[::-1] if is_dense(run)}.values())[::-1]  # one a seed
        if not dense:
            why = f"no dense run of {named.model} with the same {named.suite} settings{_in_brackets(named.differs)}"
            skipped += [(run.id, why) for run in members]
        elif measure := _measure_of(dense[0], asked.suite):  # otherwise it is not compared item by item, e.g. lens
            if (
                measure is ANSWERS and dense[0].answers(asked.suite, "share").height
            ):  # these are not compared beside them
                named = replace(named, differs=", ".join(filter(None, [named.differs, _ALONE])))
            group = Group(named, dense[0], measure, seeds={dense[0].id: dense})
            skipped += _fill(group, [run for run in members if not is_dense(run)])
            (groups if measure is ANSWERS else measured).append(group)
    return Comparisons(groups, measured, skipped, runs)


def is_dense(run: Run) -> bool:
    """Whether the model is unchanged."""
    return _is_dense(run.config["choices"])


def items_of(run: Run, suite: str) -> pl.LazyFrame:
    """A suite's items that have a right answer, as a lazy table: only the columns used are read."""
    return run.scan_items().filter((pl.col("suite") == suite) & pl.col("correct").is_not_null())


def _fill(group: Group, runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """Group runs by setting; return those that cannot be compared, with reasons."""
    settings: dict[tuple[str, int], Run] = {}
    twins: Counter[tuple[str, int]] = Counter()  # of the same seed, e.g. on another device: a separate setting
    for run in runs:
        if group.measure is not ANSWERS and run.report.get("dense", {}).get(OTHER_TOKENIZER):
            yield (
                run.id,
                f"its tokenizer is not that of {group.asked.model}, so its {group.asked.suite} is over other tokens",
            )
            continue
        if not _as_many_items(run, group.dense, group.asked.suite):  # else not read
            try:
                group.gains(run)
            except ValueError as error:
                yield run.id, str(error)
                continue
        setting = _setting(run)
        first = settings.setdefault((setting, twins[setting, run.config["seed"]]), run)
        twins[setting, run.config["seed"]] += 1
        if first is run:
            group.runs.append(run)
        group.seeds.setdefault(first.id, []).append(run)


def _as_many_items(run: Run, dense: Run, suite: str) -> bool:
    """Whether both report the same number of questions; under one protocol these are the same questions.

    For runs that were made elsewhere, only the items say what was asked.
    """
    if run.taken:
        return False
    count = run.metrics.get(f"{suite}.items")
    return count is not None and count == dense.metrics.get(f"{suite}.items")


def _setting(run: Run) -> str:
    """What was done to the model, apart from the seed."""
    if (deciding := run.config.get("identity")) is not None:
        did = {part: deciding.get(part) for part in ("target", "compression", "recovery", "corpus")}
    else:
        parts = ("target", "compression", "recovery", "corpus", "sparsity", "reading")
        did = {part: run.config.get(part) for part in parts}
    return json.dumps(seedless(did | {"choices": run.config["choices"]}), sort_keys=True, default=str)


def _deciding(run: Run, suite: str) -> dict[str, Any]:
    told = run.report.get("dense") or run.report.get("model", {})
    return (
        {
            "model": {key: value for key, value in told.items() if key not in _PLACES},
            "dtype": run.environment.get("dtype"),
            "settings": seedless(_asked_how(run, suite)),
            "data": run.report["eval"][suite].get("fingerprint"),
        }
        | _scored_in(run)
        | _machine(run, suite)
    )


def _asked_how(run: Run, suite: str) -> dict[str, Any]:
    """The settings of a suite that decide its questions."""
    if (deciding := run.config.get("identity")) is not None:
        return dict(deciding["eval"][suite])
    settings = {key: value for key, value in run.config["eval"][suite].items() if key not in _PLACES}
    return settings | ({"format": run.environment["format"]} if "format" in run.environment else {})


def _scored_in(run: Run) -> dict[str, Any]:
    """The dtype of the products in scoring, if it was not the model's own."""
    scored_in = run.environment.get("scored_in")
    return {"scored_in": scored_in} if scored_in else {}


def _machine(run: Run, suite: str) -> dict[str, Any]:
    """The device on which time was measured, for a suite that records it."""
    asked, environment = run.report["eval"][suite], run.environment
    if "device" not in asked:
        return {}
    return {"machine": environment.get("gpu") or environment.get("host"), "threads": asked.get("threads")}


def _digest(deciding: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()[:12]


def seedless(value: Any) -> Any:
    """Settings without the seeds in them, at any depth."""
    if isinstance(value, Mapping):
        return {key: seedless(part) for key, part in value.items() if key != "seed"}
    return [seedless(part) for part in value] if isinstance(value, list | tuple) else value


def _in_brackets(text: str) -> str:
    return f" ({text})" if text else ""


def _measure_of(run: Run, suite: str) -> Measure | None:
    """The first measure that a suite's items have."""
    items = run.scan_items()
    there = [measure for measure in MEASURES if measure.column in items.collect_schema()]
    of_suite = items.filter(pl.col("suite") == suite)
    counts = of_suite.select(pl.col(measure.column).count() for measure in there).collect() if there else None
    return next((measure for measure in there if counts[measure.column].item()), None) if counts is not None else None


def _measured(run: Run, suite: str, measure: Measure) -> pl.LazyFrame:
    """Keys and values of a suite's items, as a lazy table."""
    column = pl.col(measure.column)
    there = run.scan_items().filter((pl.col("suite") == suite) & column.is_not_null())
    if measure.item is None:
        return there.select(*KEY, column)
    return there.group_by("task", measure.item.alias("id"), maintain_order=True).agg(column.mean())
