"""The fact ledger: what happened to every fact under compression, and which recovery restored it.

Flips are those of Dutta et al. (2024), "Accuracy is Not All You Need": the answers that went from right to wrong or
from wrong to right. All flips also count wrong answers that became other wrong answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from knowledge_compression.analysis.comparisons import KEY, items_of
from knowledge_compression.results.store import Run

REDIRECTION, WEIGHTS, UNKNOWN = "redirection", "weights", "unknown"
# How the strategies of this project restore, for runs whose report does not say so.
_BY_STRATEGY = dict.fromkeys(("prompt", "prefix", "idp", "concat"), REDIRECTION) | {"lora": WEIGHTS, "none": "nothing"}

KEPT, LOST, GAINED, NEVER_KNOWN = "kept", "lost", "gained", "never known"
NEVER_THERE, EARLY, LATE, TO_THE_END = "never there", "early", "late", "to the end"
BY_REDIRECTION, BY_WEIGHTS, BY_BOTH, BY_NEITHER = "by redirection", "by weights", "by both", "by neither"


def restores_by(run: Run) -> str:
    """How a run's recovery restores, as declared by its class: by ``weights``, ``redirection`` or ``nothing``.

    For runs whose ``report.json`` does not say so, the recorded strategy decides; ``unknown`` if it is not one of
    this project's. Names of configuration files have no influence.
    """
    recovery = run.report.get("recovery", {})
    return str(recovery.get("restores_by") or _BY_STRATEGY.get(recovery.get("strategy"), UNKNOWN))


def fates(dense: Run, compressed: Run, suite: str, *, by: Sequence[str] = ()) -> pl.DataFrame:
    """What compression did to every item.

    Args:
        dense, compressed: the two runs.
        suite: which suite's items.
        by: further columns of the dense run's items to return, e.g. ``bin`` (how often training stated the fact).

    Returns:
        One row per item: ``task, id, question, gold, before, after`` (the two answers), ``fate`` (kept, lost, gained or
        never known), ``flip`` and ``changed`` (whether it counts among the flips and among all flips; the latter is
        null for a wrong answer that is not known as text), and how far the gold answer sank: ``rank_before,
        rank_after, log_prob_before, log_prob_after``.
    """
    columns = [*KEY, "correct", "prediction", "rank", "log_prob"]
    before = items_of(dense, suite).select(*columns, pl.col("prompt").alias("question"), "gold", *by)
    after = items_of(compressed, suite).select(columns)
    joined = before.join(after, on=KEY, how="inner", suffix="_after", maintain_order="left")
    known, knows = pl.col("correct"), pl.col("correct_after")
    wrong_otherwise = ~known & ~knows & (pl.col("prediction") != pl.col("prediction_after"))
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
        (known != knows).alias("flip"),
        ((known != knows) | wrong_otherwise).alias("changed"),
        pl.col("rank").alias("rank_before"),
        "rank_after",
        pl.col("log_prob").alias("log_prob_before"),
        "log_prob_after",
        *by,
    ).collect()


def depths(dense: Run, compressed: Run, suite: str) -> pl.DataFrame | None:
    """The depth at which the right answers to lost facts are found (both runs with ``eval=[<suite>,lens]``).

    Returns:
        One row for each lost fact to which the lens was applied:

        - ``task, id, question, gold``;
        - ``ranks_before, ranks_after``: the answer's rank by depth, before the first block and after each;
        - ``first_until``: the last depth at which the compressed model ranks the answer first (null: none);
        - ``went``: where that depth is: ``to the end`` (after the last block; the lens reads only an answer's first
          token, so the rest went wrong, or another answer that begins alike won), ``late`` (in the last third of the
          blocks), ``early`` (before), or ``never there``.

        None if either run lacks the lens.
    """
    looked = [_lens(run, suite) for run in (dense, compressed)]
    if looked[0] is None or looked[1] is None:
        return None
    lost = fates(dense, compressed, suite).lazy().filter(pl.col("fate") == LOST).select(*KEY, "question", "gold")
    both = (
        looked[0]
        .rename({"ranks": "ranks_before"})
        .join(looked[1].rename({"ranks": "ranks_after"}), on=KEY, maintain_order="left")
    )
    blocks = pl.col("ranks_after").list.len() - 1
    first = pl.col("ranks_after").list.eval(pl.element() == 1)
    last = blocks - first.list.reverse().list.arg_max()
    return (
        lost.join(both, on=KEY, maintain_order="left")
        .with_columns(pl.when(first.list.any()).then(last).cast(pl.Int32).alias("first_until"))
        .with_columns(
            pl.when(pl.col("first_until").is_null())
            .then(pl.lit(NEVER_THERE))
            .when(pl.col("first_until") == blocks)
            .then(pl.lit(TO_THE_END))
            .when(3 * pl.col("first_until") >= 2 * blocks)
            .then(pl.lit(LATE))
            .otherwise(pl.lit(EARLY))
            .alias("went")
        )
        .collect()
    )


def looked_into(run: Run, suite: str) -> bool:
    """Whether the run applied the lens to a suite's facts and recorded the ranks."""
    asked = run.report["eval"].get("lens", {})
    return asked.get("of") == suite and "depth_rank" in run.scan_items().collect_schema()


def _lens(run: Run, suite: str) -> pl.LazyFrame | None:
    """The lens's ranks of a suite's facts, if the run applied it to them."""
    if not looked_into(run, suite):
        return None
    return run.scan_items().filter(pl.col("suite") == "lens").select(*KEY, pl.col("depth_rank").alias("ranks"))


def restorations(
    dense: Run, compressed: Run, recovered: Mapping[str, Run], suite: str, *, by: Sequence[str] = ()
) -> pl.DataFrame:
    """Which recovery restored each fact that compression had lost.

    Args:
        dense, compressed: the two runs between which facts were lost.
        recovered: name (of the strategy, or longer if it was tried in several ways) to the run that recovered the
            compressed model; each has to say how it restores, see :func:`restores_by`.
        suite: which suite's items.
        by: as in :func:`fates`.

    Returns:
        One row per lost item: ``task, id, question, gold``, one boolean column per recovery, and ``restored`` (by
        redirection, by weights, by both, by neither). Strategies that were not run restore nothing: compare
        only like sets of them.

    Raises:
        ValueError: a run does not say how its recovery restores.
    """
    ways = {name: restores_by(run) for name, run in recovered.items()}
    if unknown := [name for name, way in ways.items() if way == UNKNOWN]:
        raise ValueError(f"{', '.join(unknown)}: not recorded whether by weights or by redirection")
    known = fates(dense, compressed, suite, by=by)
    lost = known.filter(pl.col("fate") == LOST).select(*KEY, "question", "gold", *by).lazy()
    for name, run in recovered.items():
        lost = lost.join(
            items_of(run, suite).select(*KEY, pl.col("correct").alias(name)), on=KEY, how="left", maintain_order="left"
        )
    redirected = pl.any_horizontal([pl.lit(False), *(pl.col(n) for n, way in ways.items() if way == REDIRECTION)])
    relearned = pl.any_horizontal([pl.lit(False), *(pl.col(n) for n, way in ways.items() if way == WEIGHTS)])
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
    """How many items have each fate, in all or by another column (``task``, ``frequency``)."""
    keys = [by, column] if by else [column]
    return ledger.group_by(keys).len("items").sort(keys)
