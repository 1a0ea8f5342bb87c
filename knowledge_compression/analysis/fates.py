"""The ledger in numbers: shares of facts by fate, frequency, relation, recovery and depth, each with its interval."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import polars as pl

from knowledge_compression.analysis.comparisons import Group, seedless
from knowledge_compression.analysis.ledger import (
    BY_BOTH,
    BY_NEITHER,
    BY_REDIRECTION,
    BY_WEIGHTS,
    EARLY,
    GAINED,
    KEPT,
    LATE,
    LOST,
    NEVER_KNOWN,
    NEVER_THERE,
    TO_THE_END,
    depths,
    fates,
    restorations,
)
from knowledge_compression.analysis.naming import recovery_name
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, accuracy, mean_t, proportion

FATES = (KEPT, LOST, GAINED, NEVER_KNOWN)
WENT = (TO_THE_END, LATE, EARLY, NEVER_THERE)
RESTORED = (BY_REDIRECTION, BY_WEIGHTS, BY_BOTH, BY_NEITHER)
OVERALL = "all facts"
# Columns of items by which facts are told apart, and what they are called.
CATEGORIES = {"task": "relation", "bin": "frequency"}

Row = dict[str, Any]


def shares_of_fates(group: Group, run: Run) -> list[Row]:
    """What compression did, for all facts and by each category that the items have.

    Returns:
        Rows with ``by`` (``all facts``, ``relation``, ``frequency``), ``value``, ``counts`` (of each of :data:`FATES`),
        ``lost`` (of the facts that the dense model knew) and ``gained`` (of those that it did not); and of the lost
        facts how far the right answer sank: its mean ``rank`` now, and by how many nats its log-probability ``fell``.
        An :class:`Estimate` each, None where there are no such facts.
    """
    extra = [column for column in _categories(group) if column != "task"]
    ledger = fates(group.dense, run, group.asked.suite, by=extra)
    rows = []
    for by, value, facts in _parts(ledger, ["task", *extra]):
        counts, lost = Counter(facts["fate"].to_list()), facts.filter(pl.col("fate") == LOST)
        fell = lost.select(pl.col("log_prob_before") - pl.col("log_prob_after"))["log_prob_before"]
        rows.append(
            {"by": by, "value": value, "counts": [counts[fate] for fate in FATES]}
            | {"lost": _share(counts[LOST], counts[KEPT]), "gained": _share(counts[GAINED], counts[NEVER_KNOWN])}
            | {"rank": mean_t(lost["rank_after"].drop_nulls().to_numpy())}
            | {"fell": mean_t(fell.filter(fell.is_finite()).to_numpy())}
        )
    return rows


def shares_restored(group: Group) -> list[Row]:
    """What brought back the facts that each compression lost, where a recovery of it is in the store.

    Returns:
        Rows with ``compressed`` (run id), ``tried`` (names of the recoveries), ``by``, ``value``, ``lost`` (how many
        facts), and for each of :data:`RESTORED` ``counts`` and ``shares`` (an :class:`Estimate` each).
    """
    extra = [column for column in _categories(group) if column != "task"]
    rows = []
    for compressed, recovered in recoveries(group):
        ledger = restorations(group.dense, compressed, recovered, group.asked.suite, by=extra)
        for by, value, facts in _parts(ledger, extra):
            counts = Counter(facts["restored"].to_list())
            lost = sum(counts.values())
            shares = [_share(counts[name], lost - counts[name]) for name in RESTORED]
            rows.append(
                {"compressed": compressed.id, "tried": list(recovered), "by": by, "value": value, "lost": lost}
                | {"counts": [counts[name] for name in RESTORED], "shares": shares}
            )
    return rows


def recoveries(group: Group) -> Iterator[tuple[Run, dict[str, Run]]]:
    """Every compressed run that was recovered, with its recoveries by name."""
    for compressed in group.members:
        if compressed.config["choices"]["recovery"] != "none" or compressed in group.seeds.get(group.dense.id, []):
            continue
        recovered = [
            run
            for run in group.members
            if run.config["choices"]["recovery"] != "none" and _treatment(run) == _treatment(compressed)
        ]
        if recovered:
            yield compressed, _named(recovered)


def shares_by_depth(group: Group, run: Run) -> Row | None:
    """At which depths the answers to the facts that a run lost still rank first, in it and in the dense model.

    Returns:
        ``before`` and ``after``: an :class:`Estimate` a depth, the first before the first block; ``went``: share of
        the lost facts by where they went, deepest first, as in :func:`~.ledger.depths`. None where the lens was not
        held over both runs, or nothing was lost.
    """
    lost = depths(group.dense, run, group.asked.suite)
    if lost is None or lost.is_empty():
        return None

    def first(column: str) -> list[Estimate]:
        ranks = np.array(lost[column].to_list())
        return [accuracy(at == 1) for at in ranks.T]

    counts = Counter(lost["went"].to_list())
    went = {name: _share(counts[name], lost.height - counts[name]) for name in WENT if counts[name]}
    return {"before": first("ranks_before"), "after": first("ranks_after"), "went": went, "lost": lost.height}


def _categories(group: Group) -> list[str]:
    there = group.dense.scan_items().collect_schema()
    return [column for column in CATEGORIES if column in there]


def _parts(ledger: pl.DataFrame, categories: list[str]) -> Iterator[tuple[str, str, pl.DataFrame]]:
    """All facts, and those of each value of each category."""
    yield OVERALL, OVERALL, ledger
    for category in categories:
        for part in ledger.drop_nulls(category).sort(category).partition_by(category, maintain_order=True):
            yield CATEGORIES[category], part[category][0], part


def _share(such: int, others: int) -> Estimate | None:
    return proportion(such, such + others) if such + others else None


def _treatment(run: Run) -> str:
    """What was done to the model before any recovery."""
    config = run.config
    done = {key: seedless(config.get(key)) for key in ("target", "compression", "sparsity", "reading")}
    done |= {"text": run.report["compression"].get("calibration"), "seed": config["seed"]}
    return json.dumps(done | {"names": [config["choices"][k] for k in ("target", "compression")]}, sort_keys=True)


def _named(recovered: list[Run]) -> dict[str, Run]:
    """Runs by their recovery, with its size, corpus and the run's id as far as it takes to tell them apart."""
    ways: list[Callable[[Run], str]] = [
        lambda run: run.config["choices"]["recovery"],
        recovery_name,
        lambda run: f"{recovery_name(run)} {run.config['choices'].get('corpus', '')}".strip(),
    ]
    counted = [(way, Counter(map(way, recovered))) for way in ways]
    return {
        next((way(run) for way, count in counted if count[way(run)] == 1), f"{ways[-1](run)} {run.id[:8]}"): run
        for run in recovered
    }
