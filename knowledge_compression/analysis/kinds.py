"""Two kinds of questions under the same compression: how much of each is kept, above chance.

For each kind, only the share of right answers above guessing counts. (Guessing answers one item in ``choices``; none
where answers are not ranked.) A run *keeps* the ratio of its own share to the dense model's: 1 if nothing is lost, 0 if
it guesses. So questions with two answers and with thousands can be compared. Items are resampled within each kind;
seeds, shared by both kinds, are resampled too. The wordings of one fact are not independent: their mean counts as one
item.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from knowledge_compression.analysis.claims import Kind
from knowledge_compression.analysis.comparisons import KEY, Comparisons, Group, items_of
from knowledge_compression.resampling import RESAMPLES, bootstrap
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, mean

Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """The items of one kind that a suite asks.

    Attributes:
        kind: the kind.
        group: the suite's runs.
        tasks: the tasks that count; none means all of the suite's.
    """

    kind: Kind
    group: Group
    tasks: tuple[str, ...]

    @cached_property
    def name(self) -> str:
        """The suite and, if not all of its items count, their tasks."""
        return f"{self.group.asked.name} {', '.join(self.tasks)}" if self.tasks else self.group.asked.name

    @cached_property
    def rows(self) -> NDArray[np.bool_]:
        """Which of the group's items count: ``[items]``."""
        if not self.tasks:
            return np.ones(self.group.items.height, bool)
        return self.group.items["task"].str.split(".").list.first().is_in(list(self.tasks)).to_numpy()

    @cached_property
    def _told(self) -> pl.DataFrame:
        """For each item of the kind: the chance of guessing it, and the number of its fact."""
        items = items_of(self.group.dense, self.group.asked.suite)
        fact = pl.col("fact") if "fact" in items.collect_schema() else pl.col("id")
        of = items.select(*KEY, "choices", fact.alias("fact")).collect()
        told = self.group.items.join(of, on=KEY, how="left", maintain_order="left").filter(pl.Series(self.rows))
        fact_of_task = pl.struct("task", pl.col("fact").fill_null(pl.col("id")))
        return told.select((1 / pl.col("choices")).fill_null(0.0).alias("chance"), fact_of_task.rank("dense") - 1)

    def above(self, run: Run) -> NDArray[np.float64]:
        """Right (1) or wrong (0), minus chance, mean over the wordings of each fact: ``[facts]``."""
        right = self.group.correct(run)[self.rows] - self._told["chance"].to_numpy()
        of = self._told["task"].to_numpy()
        return np.bincount(of, right) / np.bincount(of)

    def table(self, runs: Sequence[Run], seeds: Sequence[int]) -> NDArray[np.float64]:
        """:meth:`above` of the dense model, and its mean over these runs' settings: ``[2, seeds, facts]``."""
        group = self.group
        dense = np.stack([self.above(group.under(group.dense, seed)) for seed in seeds])
        each = [[self.above(group.under(run, seed)) for seed in seeds] for run in runs]
        return np.stack([dense, np.mean(each, axis=0)])


def asked(group: Group, kind: Kind) -> Asked | None:
    """The items of a kind in a group; None if there are none that the dense model answers above chance.

    Where the dense model guesses, there is nothing to lose: its lower bound (95 %) must lie above chance, over all
    items or, if the kind names tasks, for each of those that count.
    """
    if group.asked.suite not in kind.suites:
        return None
    named = kind.suites[group.asked.suite]
    each = [Asked(kind, group, (task,)) for task in named] or [Asked(kind, group, ())]
    able = [one for one in each if one.rows.sum() > 1 and mean(one.above(group.dense)).low > 0]
    return Asked(kind, group, tuple(task for one in able for task in one.tasks)) if able else None


def pairs(groups: Sequence[Group], kinds: tuple[Kind, Kind]) -> Iterator[tuple[Asked, Asked, list[Run]]]:
    """Every pair of suites of these kinds that the same runs answered, and those runs, one for each setting."""
    first, second = ([found for group in groups if (found := asked(group, kind))] for kind in kinds)
    for one in first:
        for other in second:
            there = {run.id for run in other.group.runs}
            runs = [run for run in one.group.runs if run.id in there]
            if runs and one.group.dense.id == other.group.dense.id:
                yield one, other, runs


def kept(tables: Sequence[NDArray[np.float64]]) -> list[Estimate]:
    """The share of the dense model's answers above chance that is kept, for each table of :meth:`Asked.table`."""
    ends = bootstrap([[table] for table in tables], _ratio)
    found = []
    for table, end in zip(tables, ends, strict=True):
        value = float(_ratio(*table.mean(axis=(1, 2))))
        found.append(Estimate(value, end.low, end.high, table.shape[-1]))
    return found


def differences(
    both: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], resamples: int | None = RESAMPLES
) -> list[Estimate]:
    """The share kept of the first kind minus that of the second, for each pair of tables of the same seeds.

    The kinds share no items, so they are resampled independently of each other, under the same seeds.

    Args:
        both: pairs of tables of :meth:`Asked.table`.
        resamples: number of resamples. By default so many that the bootstrap's p-value, used with one seed too, can
        still be small after a correction for a hundred findings. None takes as many as an interval needs.
    """
    # The bootstrap averages over both sets of items. With one set negated, twice that mean is the difference.
    signed = [[one, np.stack([other[0], -other[1]])] for one, other in both]
    ends = bootstrap(signed, lambda dense, run: 2 * _ratio(dense, run), resamples=resamples)
    found = []
    for (one, other), end in zip(both, ends, strict=True):
        value = float(_ratio(*one.mean(axis=(1, 2))) - _ratio(*other.mean(axis=(1, 2))))
        found.append(Estimate(value, end.low, end.high, one.shape[-1] + other.shape[-1], end.p))
    return [replace(one, p=1.0) if np.isnan(one.value) else one for one in found]


def by_kind(comparisons: Comparisons, kinds: tuple[Kind, Kind]) -> list[Row]:
    """What every run keeps of both kinds.

    Returns:
        Rows with ``run`` (id), ``suites`` (the names of both), ``kept`` (an :class:`Estimate` of each) and
        ``difference``, the first minus the second.
    """
    rows: list[Row] = []
    tables: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for one, other, runs in pairs(comparisons.groups, kinds):
        for run in runs:
            seeds = [seed or 0 for seed in one.group.seeds_of(run)]
            tables.append((one.table([run], seeds), other.table([run], seeds)))
            rows.append({"run": run.id, "suites": [one.name, other.name]})
    shares = kept([table for both in tables for table in both])
    for row, first, second, difference in zip(rows, shares[::2], shares[1::2], differences(tables, None), strict=True):
        row |= {"kept": [first, second], "difference": difference}
    return rows


def _ratio(dense: Any, run: Any) -> Any:
    """The share that is kept; nan in a resample in which the dense model does not beat chance."""
    return run / np.where(dense > 0, dense, np.nan)
