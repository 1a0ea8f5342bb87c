"""Answers made elsewhere, as runs of a store that are marked as imported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from knowledge_compression.analysis.comparisons import KEY, Group, compare, is_dense, items_of
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.samples import accuracies, extra_columns
from knowledge_compression.heavy import pl
from knowledge_compression.identity import digest_of
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.taking.answers import Answers, digests
from knowledge_compression.taking.said import UNKNOWN, plain

NOTE = "taken from results that other tools made"
TAKEN = "taken"  # the key of the mark in a run's settings


@dataclass(frozen=True)
class Taken:
    """The outcome of an import.

    Attributes:
        new: the runs that were written.
        already: number of runs that were in the store before.
        notes: what does not pair and what was left out, with counts.
    """

    new: list[Run]
    already: int
    notes: list[str]


def run_of(answers: Answers, by: str) -> Run:
    """A run with the answers, marked as taken.

    Its id is determined by the statement about the model, the way of asking, and every answer, but not by the author or
    the files. Unknown settings are absent or null.

    Args:
        answers: the answers of one model.
        by: their author.
    """
    made, suite = answers.made, answers.suite
    how = plain(made)
    numbers = {name: how[name] for name in ("bits", "sparsity") if name in how}
    content = json.dumps(answers.items.rows(), ensure_ascii=False)
    identity: dict[str, Any] = {
        "model": made.model,
        "eval": {suite: answers.asked},
        "content": hashlib.sha256(content.encode()).hexdigest(),
    }
    if not made.dense:
        identity |= {"compression": {name: value for name, value in how.items() if name != "model"}}
        identity |= {"target": made.target} if made.target != UNKNOWN else {}
    metrics = _metrics(answers.items)
    restores = {"restores_by": made.restores_by} if made.restores_by != UNKNOWN else {}
    compression = numbers | ({"stored_bytes": made.stored_mb * 1e6} if made.stored_mb else {})
    return Run(
        id=digest_of(identity),
        config={
            "choices": {name: getattr(made, name) for name in ("model", "target", "compression", "recovery")},
            "eval": {suite: answers.asked},
            "seed": made.seed,
            "sparsity": made.sparsity,
            "reading": UNKNOWN,
            "compression": numbers,
            "identity": identity,
            TAKEN: {"by": by, "from": answers.files, "written_by": answers.tool},
        },
        metrics={f"{suite}.{name}": value for name, value in metrics.items()},
        report={
            "model": {"name": made.model, "family": made.family, "note": NOTE},
            "compression": compression,
            "recovery": {"strategy": made.recovery} | restores,
            "eval": {suite: {"tasks": sorted(answers.items["task"].unique().to_list())}},
        },
        environment={"taken": datetime.now(UTC).isoformat(timespec="seconds")},
        _items=answers.items,
    )


def runs_of(store: Path, by: str) -> list[Run]:
    """The runs of another store, marked as taken; each keeps its id, its settings and its record of the machine.

    Raises:
        BadInput: there are none that can be read.
    """
    runs, unreadable = RunStore(store).scan()
    if not runs:
        why = f" that can be read ({unreadable[0][0]}: {unreadable[0][1]})" if unreadable else ""
        raise BadInput(f"{store} holds no finished runs{why}")
    taken = []
    for run in runs:
        assert run.folder is not None
        files = digests([run.folder / "items.parquet", run.folder / "metrics.json"], store)
        mark = run.config.get(TAKEN, {"by": by, "from": files, "written_by": "knowledge_compression"})
        report = dict(run.report)
        if layers := run.layers:
            report["compression"] = {**report["compression"], "layers": layers}
        taken.append(replace(run, config={**run.config, TAKEN: mark}, report=report, _items=run.items, folder=None))
    return taken


def take(runs: Sequence[Run], outputs: Path, notes: Sequence[str] = ()) -> Taken:
    """Write runs into a store; all of them are checked before the first is written.

    Raises:
        BadInput: two of them claim to be the uncompressed run of the same model, an item has another right answer
            than in the store, or the store cannot be written.
    """
    store = RunStore(outputs)
    there = list(store)
    known = {run.id for run in there}
    new = list({run.id: run for run in runs if run.id not in known}.values())
    found = [*notes, *_pairing(there, new)]
    for run in new:
        with store.claim(run.id):
            store.write(run)
    return Taken(new, len({run.id for run in runs}) - len(new), found)


def _metrics(items: pl.DataFrame) -> dict[str, float]:
    missing = [name for name in extra_columns() if name not in items.columns]
    whole = items.with_columns(pl.lit(None, dtype=extra_columns()[name]).alias(name) for name in missing)
    metrics = accuracies(whole)
    gold = pl.coalesce(pl.col("gold_index").cast(pl.String), "gold")
    if not whole.select(gold.null_count()).item() and "accuracy" in metrics:
        often = whole.group_by("task").agg(gold.value_counts(sort=True).struct.field("count").first())
        metrics["majority"] = float(often.to_series(1).sum()) / whole.height
    return metrics


def _pairing(there: Sequence[Run], new: Sequence[Run]) -> list[str]:
    """Items of the new runs that do not pair with their dense baselines, counted by kind.

    Raises:
        BadInput: see :func:`take`.
    """
    dense: dict[str, Run] = {}
    for run in [*there, *new]:
        if run.taken and is_dense(run):
            model = run.config["choices"]["model"]
            told = digest_of([model, run.config["eval"], run.config["seed"]])
            if (other := dense.setdefault(told, run)) is not run:
                raise BadInput(
                    f"{model} has two uncompressed runs of {', '.join(run.config['eval'])} with different answers "
                    f"({other.id[:8]}, {run.id[:8]}); take one of them, or give one another name"
                )
    comparisons = compare([*there, *new])
    fresh = {run.id: run for run in new}
    notes = []
    for group in [*comparisons.groups, *comparisons.measured]:
        for run in group.members:
            if run.id in fresh and run.taken and not is_dense(run):
                notes += _differences(group, run)
    return notes + [f"{_called(fresh[run_id])}: {why}" for run_id, why in comparisons.skipped if run_id in fresh]


def _differences(group: Group, run: Run) -> list[str]:
    """Items that only one of a run and its baseline has; refuses items whose right answers differ."""
    mine, theirs = (items_of(of, group.asked.suite).select(*KEY, "gold").collect() for of in (run, group.dense))
    both = mine.join(theirs, on=KEY, suffix="_dense", maintain_order="left")
    unlike = both.filter(pl.col("gold") != pl.col("gold_dense"))
    if unlike.height:
        task, item, ours, dense = unlike.select(*KEY, "gold", "gold_dense").row(0)
        raise BadInput(
            f"{unlike.height} items of {_called(run)} have other right answers in its uncompressed run "
            f"(the first: {task} {item}, {ours} and {dense}); they are not the same questions"
        )
    notes = []
    for has, lacks, whose in ((mine, theirs, "it"), (theirs, mine, "the uncompressed run")):
        if (alone := has.join(lacks, on=KEY, how="anti", maintain_order="left")).height:
            first = " ".join(alone.select(KEY).row(0))
            notes.append(f"{_called(run)}: {alone.height} items are only in {whose} (the first: {first})")
    return notes


def _called(run: Run) -> str:
    choices = run.config["choices"]
    words = [choices[part] for part in ("model", "target", "compression", "recovery")]
    return " ".join(word for word in words if word not in ("none", UNKNOWN))
