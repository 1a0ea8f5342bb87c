"""Facts asked in several wordings: known in all, in some or in none; and whether the answers agree (ParaRel)."""

from __future__ import annotations

from knowledge_compression.heavy import pl

ALL, SOME, NONE = "all", "some", "none"
_FACT = ("task", "fact")


def has_wordings(items: pl.DataFrame) -> bool:
    """Whether these items ask at least one fact in several wordings.

    A run keeps the items of its suites in one table, so items of a suite without facts may have the columns, all null.
    """
    if not {"fact", "wording", "correct"} <= set(items.columns):
        return False
    asked = items.filter(pl.col("fact").is_not_null())
    return bool(asked.height > asked.select(*_FACT).n_unique())


def facts(items: pl.DataFrame) -> pl.DataFrame:
    """One row a fact that is asked in several wordings.

    Args:
        items: with the columns ``task``, ``fact``, ``prediction`` and ``correct``, one row for each fact and wording.

    Returns:
        ``task``, ``fact``, ``wordings`` (how many), ``known`` (in ``all``, ``some`` or ``none`` of them), ``pairs`` of
        wordings, and ``agreeing``: how many of those have the same answer, right or wrong.
    """
    pairs, right = pl.col("wordings") * (pl.col("wordings") - 1) // 2, pl.col("right")
    alike = (
        items.group_by(*_FACT, "prediction")
        .len()
        .group_by(*_FACT)
        .agg((pl.col("len") * (pl.col("len") - 1) // 2).sum())
    )
    return (
        items.group_by(*_FACT, maintain_order=True)
        .agg(pl.len().alias("wordings"), pl.col("correct").sum().alias("right"))
        .filter(pl.col("wordings") > 1)
        .join(alike.rename({"len": "agreeing"}), on=_FACT, maintain_order="left")
        .select(
            *_FACT,
            "wordings",
            pl.when(right == pl.col("wordings"))
            .then(pl.lit(ALL))
            .when(right > 0)
            .then(pl.lit(SOME))
            .otherwise(pl.lit(NONE))
            .alias("known"),
            pairs.alias("pairs"),
            "agreeing",
        )
    )


def wording_metrics(items: pl.DataFrame) -> dict[str, float]:
    """Knowledge as a property of the fact, and consistency; empty if no fact is asked in several wordings.

    ``known_in_all``, ``known_in_some``, ``known_in_none``: shares of the facts. ``consistency``: of all pairs of
    wordings of a fact, the share in which the answers are the same, right or wrong; ``consistency_known`` and
    ``consistency_unknown``: of the facts known in at least one wording, and in none. Consistencies are means over
    relations, each the share of all its pairs (Elazar et al. 2021, "Measuring and Improving Consistency in Pretrained
    Language Models", section 3; there Know-Const and Unk-Const). ``known_in_all_macro`` is their Consistent-Acc.
    """
    if not has_wordings(items):
        return {}
    of = facts(items)
    metrics = {f"known_in_{known}": float((of["known"] == known).mean() or 0.0) for known in (ALL, SOME, NONE)}  # type: ignore[arg-type]
    by_task = of.group_by("task").agg((pl.col("known") == ALL).mean()).sort("task")
    metrics["known_in_all_macro"] = float(by_task["known"].mean() or 0.0)  # type: ignore[arg-type]
    parts = {"": of, "_known": of.filter(pl.col("known") != NONE), "_unknown": of.filter(pl.col("known") == NONE)}
    return metrics | {f"consistency{name}": consistency(part) for name, part in parts.items() if part.height}


def consistency(of: pl.DataFrame) -> float:
    """The mean over relations of the share of agreeing pairs, from the rows of :func:`facts`."""
    by_task = of.group_by("task").agg(pl.col("agreeing").sum() / pl.col("pairs").sum()).sort("task")
    return float(by_task["agreeing"].mean() or 0.0)  # type: ignore[arg-type]
