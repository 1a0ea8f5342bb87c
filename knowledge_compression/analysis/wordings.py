"""Facts asked in several wordings: whether they are known in all, some or none, and what restores half-lost ones.

A fact is *half lost* if compression lost it in one wording and kept it in another, and *wholly lost* if it lost every
wording in which the dense model knew it. If a half-lost fact is displaced rather than forgotten, redirecting the input
(prompts; Hoang et al. 2024) should bring its lost wordings back more often than those of wholly lost facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from knowledge_compression.analysis.comparisons import KEY, Group, items_of
from knowledge_compression.analysis.fates import recoveries
from knowledge_compression.analysis.ledger import KEPT, LOST, REDIRECTION, WEIGHTS, fates, restores_by
from knowledge_compression.evaluation.wordings import ALL, NONE, SOME, consistency, facts, has_wordings
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, difference_of_means, mean, proportion

KNOWN = (ALL, SOME, NONE)
HALF, WHOLLY = "half lost", "wholly lost"
BOTH = f"{REDIRECTION} less {WEIGHTS}"

Row = dict[str, Any]


def asks_wordings(group: Group) -> bool:
    """Whether the suite asked at least one fact in several wordings."""
    there = items_of(group.dense, group.asked.suite).collect_schema()
    if not {"fact", "wording"} <= set(there):
        return False
    return has_wordings(items_of(group.dense, group.asked.suite).select("task", "fact", "wording", "correct").collect())


def knowledge(group: Group) -> list[Row]:
    """What the dense model and every run know, by fact.

    Returns:
        Rows with ``run`` (id), ``facts`` (asked in several wordings), ``known`` (of each of :data:`KNOWN`, the share of
        the facts, an :class:`Estimate`), and ``consistency`` (ParaRel's, see
        :func:`~knowledge_compression.evaluation.wordings.wording_metrics`; an interval over facts if there is only one
        relation, else over relations). Empty if no fact is asked in several wordings.
    """
    if not asks_wordings(group):
        return []
    rows = []
    for run in group.members:
        of = facts(items_of(run, group.asked.suite).collect())
        count = [int((of["known"] == known).sum()) for known in KNOWN]
        rows.append(
            {"run": run.id, "facts": of.height, "known": [proportion(n, of.height) for n in count]}
            | {"consistency": _consistency(of)}
        )
    return rows


def half_lost(dense: Run, compressed: Run, suite: str) -> pl.DataFrame:
    """The facts that the dense model knew in several wordings and that compression lost in at least one.

    Returns:
        One row for each lost wording: ``task``, ``id``, ``fact``, ``lost`` (how many of its wordings), ``kept``, and
        ``how``: half lost or wholly lost.
    """
    lost, kept = pl.col("fate") == LOST, pl.col("fate") == KEPT
    known = fates(dense, compressed, suite, by=["fact"]).filter(lost | kept)
    counted = known.with_columns(
        lost.sum().over("task", "fact").alias("lost"), kept.sum().over("task", "fact").alias("kept")
    )
    return counted.filter(lost & (pl.col("lost") + pl.col("kept") > 1)).select(
        *KEY,
        "fact",
        "lost",
        "kept",
        pl.when(pl.col("kept") > 0).then(pl.lit(HALF)).otherwise(pl.lit(WHOLLY)).alias("how"),
    )


def brought_back(group: Group) -> list[Row]:
    """Whether half-lost facts come back by redirection or by weights more often than wholly lost ones.

    If they come back more often by either way, that only shows that they were lost narrowly. They are displaced rather
    than forgotten if redirection has more of an advantage over weights with them than with wholly lost ones; the last
    row tests this.

    Returns:
        Rows with ``compressed`` (run id), ``by`` (redirection, weights, or the first minus the second), ``tried``
        (names of the recoveries), ``facts`` and ``back`` (for half lost and wholly lost: number of facts, and the mean
        over them of the share of their lost wordings that at least one of the recoveries made right, an
        :class:`Estimate` or None without facts), and ``difference``: of those means, by Welch's t-test over facts; None
        if either has no facts.
    """
    if not asks_wordings(group):
        return []
    suite = group.asked.suite
    rows = []
    for compressed, recovered in recoveries(group):
        lost = half_lost(group.dense, compressed, suite)
        tried = {
            way: [name for name, run in recovered.items() if restores_by(run) == way] for way in (REDIRECTION, WEIGHTS)
        }
        back = {way: _shares(lost, [recovered[name] for name in names], suite) for way, names in tried.items() if names}
        if len(back) == 2:
            back[BOTH] = back[REDIRECTION].with_columns(pl.col("back") - back[WEIGHTS]["back"])
            tried[BOTH] = [name for names in tried.values() for name in names]
        for way, told in back.items() if lost.height else ():
            values = [told.filter(pl.col("how") == how)["back"].to_numpy() for how in (HALF, WHOLLY)]
            rows.append(
                {"compressed": compressed.id, "by": way, "tried": tried[way], "facts": [len(of) for of in values]}
                | {"back": [mean(of) if len(of) else None for of in values]}
                | {"difference": difference_of_means(*values) if all(map(len, values)) else None}
            )
    return rows


def _shares(lost: pl.DataFrame, recovered: Sequence[Run], suite: str) -> pl.DataFrame:
    """The share of each fact's lost wordings that at least one recovered model answers correctly."""
    known = lost.lazy()
    names = [f"right_{i}" for i in range(len(recovered))]
    for name, run in zip(names, recovered, strict=True):
        known = known.join(
            items_of(run, suite).select(*KEY, pl.col("correct").alias(name)), on=KEY, how="left", maintain_order="left"
        )
    right = pl.any_horizontal([pl.col(name).fill_null(value=False) for name in names])
    return known.group_by("task", "fact", "how", maintain_order=True).agg(right.mean().alias("back")).collect()


def _consistency(of: pl.DataFrame) -> Estimate:
    by_task = of.group_by("task").agg(pl.col("agreeing").sum() / pl.col("pairs").sum()).sort("task")
    if by_task.height > 1:
        return mean(by_task["agreeing"].to_numpy())
    over_facts = mean((of["agreeing"] / of["pairs"]).to_numpy())
    return Estimate(consistency(of), over_facts.low, over_facts.high, of.height)
