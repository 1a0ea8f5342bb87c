"""The interface of evaluation suites, and the item table that all of them fill."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from knowledge_compression.heavy import pl

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring import Scorer


# One row per fact or question, and what its columns hold. A suite may add its own columns after these.
ITEM_COLUMNS: Mapping[str, str] = {
    "suite": "String",  # atlas, lama, harness, perplexity, world, ...
    "task": "String",  # the relation or task within the suite
    "id": "String",  # stable across runs and models: the same fact in the same wording has the same id
    "prompt": "String",  # the question to the model
    "gold": "String",  # the right answer
    "prediction": "String",  # the model's answer
    "correct": "Boolean",
    "log_prob": "Float64",  # natural log-probability (or score) of the gold answer
    "prediction_log_prob": "Float64",  # the same for the model's answer; null if answers are not ranked
    "margin": "Float64",  # the gold answer's score minus the best wrong one's; negative if the model is wrong
    "rank": "Int64",  # 1 = the gold answer ranks first; null if answers are not ranked
    "choices": "Int64",  # number of answers among which it was ranked; null if not ranked
}


def item_schema() -> dict[str, pl.DataType]:
    """The columns of every suite's items."""
    return {name: getattr(pl, kind)() for name, kind in ITEM_COLUMNS.items()}


@dataclass
class Evaluation:
    """The results of a suite.

    Attributes:
        metrics: numbers by flat names; ``accuracy`` or ``perplexity`` is the headline, ``<task>.accuracy`` its parts,
            ``majority`` the accuracy of always giving the most frequent answer.
        items: one row per item, :func:`item_schema` first.
        description: what was asked, JSON-ready: data sets found and missing, their digest, protocol, counts of items
            left out by reason. Runs are compared only if this agrees.
        fallbacks: deviations to be recorded, e.g. smaller batches for lack of memory.
        not_finite: number of answers that are not finite; if there are any, there are no metrics.
    """

    metrics: dict[str, float]
    items: pl.DataFrame
    description: dict[str, Any] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    not_finite: int = 0

    def void(self) -> Evaluation:
        """The same answers, from which nothing follows: no metrics but counts, no item right or wrong."""
        counts = {name: float(n) for name, n in (("items", self.items.height), ("not_finite", self.not_finite)) if n}
        nothing = [pl.lit(None, dtype=item_schema()[name]).alias(name) for name in ("correct", "rank")]
        return replace(self, metrics=counts, items=self.items.with_columns(nothing))


def ask(suite: Suite, scorer: Scorer) -> Evaluation:
    """Ask a suite, and return its results together with the scorer's notes about its items.

    If an answer is not finite (a NaN or an infinity among the numbers of an item, or in the logits behind it), the
    suite's only metrics are the number of items asked and the number of answers that are not finite; those items are
    neither right nor wrong.

    Raises:
        BadInput: the suite does not fit the model's family, or its data is not there.
    """
    found = suite.evaluate(scorer)
    noted = [scorer.notes.of(item) for item in found.items["id"]]
    items = found.items
    if scorer.prompts.choosing is not None:
        chosen = [of.get("chosen_prompts") for of in noted]
        items = items.with_columns(pl.Series("chosen_prompts", chosen, dtype=pl.List(pl.Int8)))
    numbers = [name for name, kind in items.schema.items() if kind.is_float()]
    fine = pl.Series([of.get("finite", True) for of in noted], dtype=pl.Boolean)
    for name in numbers:
        fine &= items[name].is_finite().fill_null(value=True)
    count = int((~fine).sum())
    metrics = found.metrics
    if count:
        metrics = {"items": float(items.height)}
        cleared = [pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name) for name in numbers]
        verdicts = [pl.when(fine).then(pl.col(name)).alias(name) for name in ("correct", "rank")]
        items = items.with_columns(*cleared, *verdicts)
    elif not all(map(math.isfinite, metrics.values())):  # computed from finite numbers, e.g. a large perplexity
        count = items.height
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
    metrics = metrics | ({"not_finite": float(count)} if count else {})
    fallbacks = [*found.fallbacks, *scorer.fallbacks]
    return replace(found, metrics=metrics, items=items, fallbacks=fallbacks, not_finite=count)


class Suite(Protocol):
    """A way to test what a model knows; one file beside this one and one YAML under ``conf/eval/``.

    A suite whose questions come from files may have a method ``fingerprint() -> str``, the digest of those files; it
    enters the run's identity in place of their path.

    One whose data may not be to be had may have a method ``check_data()`` that raises ``DataUnavailable`` then; it is
    called before anything is loaded or compressed.

    One that reads no log-probabilities over the vocabulary has a class attribute ``scores = False``; ``distance=true``
    then leaves it alone.
    """

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask all questions and return the items and the metrics.

        Args:
            scorer: scores with the model to ask; questions carry the ids of their items.

        Raises:
            BadInput: the suite does not fit the model's family, or its data is not there.
        """
        ...


@runtime_checkable
class DividedSuite(Suite, Protocol):
    """A suite of parts that are asked separately, so that an interrupted run loses only the current part."""

    def parts(self) -> Mapping[str, Suite]:
        """The parts by name, in the order in which they are asked."""
        ...

    def joined(self, parts: Mapping[str, Evaluation]) -> Evaluation:
        """The suite's result from those of its parts."""
        ...


def item_table(rows: Sequence[Mapping[str, Any]], extra: Mapping[str, pl.DataType] | None = None) -> pl.DataFrame:
    """Build a table in the item schema; columns that a row lacks are null."""
    schema = item_schema() | dict(extra or {})
    return pl.DataFrame({name: [row.get(name) for row in rows] for name in schema}, schema=schema)


def accuracy_metrics(items: pl.DataFrame) -> dict[str, float]:
    """Micro and macro accuracy, accuracy by task, and the majority baseline (most frequent gold answer by task)."""
    by_task = (
        items.group_by("task")
        .agg(
            pl.col("correct").mean().alias("accuracy"),
            pl.len().alias("count"),
            pl.col("gold").value_counts(sort=True).struct.field("count").first().alias("most_frequent"),
        )
        .sort("task")
    )
    metrics = {
        "accuracy": float(items["correct"].mean() or 0.0),  # type: ignore[arg-type]
        "accuracy_macro": float(by_task["accuracy"].mean() or 0.0),  # type: ignore[arg-type]
        "majority": float(by_task["most_frequent"].sum() / max(items.height, 1)),
        "items": float(items.height),
    }
    return metrics | {f"{row['task']}.accuracy": float(row["accuracy"]) for row in by_task.iter_rows(named=True)}
