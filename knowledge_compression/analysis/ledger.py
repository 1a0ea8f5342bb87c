"""The fact ledger: what became of every single fact under compression, and what brought it back."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from knowledge_compression.analysis.comparisons import KEY, items_of
from knowledge_compression.results.store import Run

# Strategies that redirect the input, and those that change weights (Hoang et al., 2024, section 2.2).
REDIRECTION = ("prompt", "prefix", "idp", "concat")
WEIGHTS = ("lora",)

KEPT, LOST, GAINED, NEVER_KNOWN = "kept", "lost", "gained", "never known"
BY_REDIRECTION, BY_WEIGHTS, BY_BOTH, BY_NEITHER = "by redirection", "by weights", "by both", "by neither"


def fates(dense: Run, compressed: Run, suite: str) -> pl.DataFrame:
    """What compression did to every item.

    Returns:
        One row an item: ``task, id, question, gold, before, after`` (the two answers), ``fate`` (kept, lost, gained or
        never known), and how far the gold answer sank: ``rank_before, rank_after, log_prob_before, log_prob_after``.
    """
    columns = [*KEY, "correct", "prediction", "rank", "log_prob"]
    before = items_of(dense, suite).select(*columns, pl.col("prompt").alias("question"), "gold")
    after = items_of(compressed, suite).select(columns)
    joined = before.join(after, on=KEY, how="inner", suffix="_after")
    known, knows = pl.col("correct"), pl.col("correct_after")
    return joined.select(
        *KEY,
        "question",
        "gold",
        pl.col("prediction").alias("before"),
        pl.col("prediction_after").alias("after"),
        pl.when(known & knows)
        .then(pl.lit(KEPT))
        .when(known)
        .then(pl.lit(LOST))
        .when(knows)
        .then(pl.lit(GAINED))
        .otherwise(pl.lit(NEVER_KNOWN))
        .alias("fate"),
        pl.col("rank").alias("rank_before"),
        "rank_after",
        pl.col("log_prob").alias("log_prob_before"),
        "log_prob_after",
    ).collect()


def restorations(dense: Run, compressed: Run, recovered: Mapping[str, Run], suite: str) -> pl.DataFrame:
    """What brought back each fact that compression had lost.

    Args:
        dense, compressed: the two runs between which facts were lost.
        recovered: strategy name to the run that recovered the compressed model with it.
        suite: which suite's items.

    Returns:
        One row a lost item: ``task, id, question, gold``, one boolean column a strategy, and ``restored`` (by
        redirection, by weights, by both, by neither). Strategies that were not run restore nothing: compare
        only like sets of them.
    """
    lost = fates(dense, compressed, suite).filter(pl.col("fate") == LOST).select(*KEY, "question", "gold").lazy()
    for strategy, run in recovered.items():
        lost = lost.join(items_of(run, suite).select(*KEY, pl.col("correct").alias(strategy)), on=KEY, how="left")
    redirected = pl.any_horizontal([pl.lit(False), *(pl.col(s) for s in recovered if s in REDIRECTION)])
    relearned = pl.any_horizontal([pl.lit(False), *(pl.col(s) for s in recovered if s in WEIGHTS)])
    return lost.with_columns(
        pl.when(redirected & relearned)
        .then(pl.lit(BY_BOTH))
        .when(redirected)
        .then(pl.lit(BY_REDIRECTION))
        .when(relearned)
        .then(pl.lit(BY_WEIGHTS))
        .otherwise(pl.lit(BY_NEITHER))
        .alias("restored")
    ).collect()


def counts(ledger: pl.DataFrame, column: str = "fate", by: str | None = None) -> pl.DataFrame:
    """How many items met each fate, in all or by another column (``task``, ``frequency``)."""
    keys = [by, column] if by else [column]
    return ledger.group_by(keys).len("items").sort(keys)
