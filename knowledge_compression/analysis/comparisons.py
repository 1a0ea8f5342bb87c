"""A store's runs beside their dense baselines; only what was asked the same way is compared."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from knowledge_compression.results.store import Run

KEY = ["task", "id"]  # an item of a suite


@dataclass(frozen=True)
class Asked:
    """What makes two results comparable: one model, asked the same questions in the same way.

    Attributes:
        model: its name.
        suite: e.g. ``atlas``.
        protocol: short hash of the model's identity, dtype, seed, and the suite's settings and data digests.
    """

    model: str
    suite: str
    protocol: str


@dataclass
class Group:
    """All runs that may be compared with one dense baseline, for one suite."""

    asked: Asked
    dense: Run
    runs: list[Run] = field(default_factory=list)

    @cached_property
    def items(self) -> pl.DataFrame:
        """Keys of the suite's items in the dense run's order."""
        return _column(self.dense, self.asked.suite, "correct").select(KEY)

    def correct(self, run: Run) -> NDArray[np.bool_]:
        """Whether each item was right in ``run``: ``[items]``, in the order of :attr:`items`."""
        column = _column(run, self.asked.suite, "correct")
        aligned = self.items.join(column, on=KEY, how="left", maintain_order="left")["correct"]
        if aligned.null_count():
            raise ValueError(f"run {run.id} lacks items of {self.asked.suite} that its baseline has")
        return aligned.to_numpy().astype(bool)


@dataclass
class Comparisons:
    """Everything that can be compared in a store, and what cannot, with the reason.

    Attributes:
        groups: one for each model, suite and protocol that has a dense run.
        skipped: run id and why it is left out.
    """

    groups: list[Group]
    skipped: list[tuple[str, str]]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)


def compare(runs: Sequence[Run]) -> Comparisons:
    """Sort runs into groups that share a dense baseline.

    Args:
        runs: finished runs, in any order.
    """
    by_question: dict[Asked, list[Run]] = defaultdict(list)
    for run in runs:
        for suite in run.config["eval"]:
            by_question[_asked(run, suite)].append(run)
    groups, skipped = [], []
    for asked, members in sorted(
        by_question.items(), key=lambda pair: (pair[0].model, pair[0].suite, pair[0].protocol)
    ):
        dense = next((run for run in members if is_dense(run)), None)
        if dense is None:
            skipped += [
                (run.id, f"no dense run of {asked.model} with the same {asked.suite} settings") for run in members
            ]
            continue
        if "correct" not in dense.items.columns or not _column(dense, asked.suite, "correct").height:
            continue  # a suite without right and wrong answers, e.g. latency
        groups.append(Group(asked, dense, [run for run in members if run is not dense]))
    return Comparisons(groups, skipped)


def is_dense(run: Run) -> bool:
    """Whether nothing was done to the model."""
    choices = run.config["choices"]
    return choices["compression"] == "none" and choices["recovery"] == "none"


def _asked(run: Run, suite: str) -> Asked:
    deciding = {
        "model": {key: value for key, value in run.report.get("model", {}).items() if key != "path"},
        "dtype": run.environment.get("dtype"),
        "seed": run.config["seed"],
        "settings": {k: v for k, v in run.config["eval"][suite].items() if k not in ("path", "data_dir")},
        "fingerprint": run.report["eval"][suite].get("fingerprint"),
    }
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return Asked(run.config["choices"]["model"], suite, digest)


def items_of(run: Run, suite: str) -> pl.LazyFrame:
    """A suite's items that have a right answer, not yet read: only the columns asked for leave the disk."""
    items = run.items.lazy() if run.folder is None else pl.scan_parquet(run.folder / "items.parquet")
    return items.filter((pl.col("suite") == suite) & pl.col("correct").is_not_null())


def _column(run: Run, suite: str, *columns: str) -> pl.DataFrame:
    return items_of(run, suite).select(*KEY, *columns).collect()
