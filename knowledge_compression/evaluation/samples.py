"""The answer to a document in lm-eval's log, as columns of the item table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from knowledge_compression.evaluation.confidence import columns, confidence
from knowledge_compression.heavy import pl

Sample = Mapping[str, Any]
Judge = tuple[str, str]  # a metric, and the column for its value: correct, or share
JUDGES = ("acc", "exact_match")  # these decide whether an answer is right; otherwise the first metric


def by_document(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The samples of each document, one for each filter, in the order of the documents."""
    found: dict[Any, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample["doc_id"], []).append(_after_its_question(sample))
    return list(found.values())


def _after_its_question(sample: Sample) -> Sample:
    """A sample without the choices by themselves, which lm-eval asks last for ``acc_mutual_info``."""
    if "acc_mutual_info" not in sample:
        return sample
    asked = ("arguments", "filtered_resps")
    return {**sample, **{name: sample[name][: len(sample[name]) // 2] for name in asked}}


def judge_of(metrics: Sequence[str], samples: Sequence[Sample]) -> Judge | None:
    """The metric that is in [0, 1] for every item: right or wrong or, if some values lie between, a share.

    Args:
        metrics: the task's metrics that are means over its items.
        samples: all samples of the task.
    """
    for name in (*JUDGES, *metrics):
        values = [float(sample[name]) for sample in samples if isinstance(sample.get(name), Real)]
        if len(values) == len(samples) and all(0 <= value <= 1 for value in values):
            return name, "correct" if set(values) <= {0.0, 1.0} else "share"
    return None


def answer_of(
    samples: Sequence[Sample],
    output_type: str,
    judge: Judge | None,
    inputs: tuple[Sequence[str], int | str | None] | None = None,
) -> dict[str, Any]:
    """The answer columns of one document.

    Args:
        samples: the samples of the document, one for each filter; the first filter's sample is the answer.
        output_type: the type of the task in lm-eval's terms.
        judge: see :func:`judge_of`.
        inputs: for a task with several inputs and one continuation of each: the choices in the inputs, and the index of
            the right one.
    """
    first = samples[0]
    row = {
        # A task with several inputs (WinoGrande) writes its choices into the context and asks for one continuation.
        "prompt": " | ".join(dict.fromkeys(str(arguments[0]) for arguments in first["arguments"])),
        "correct_norm": bool(first["acc_norm"]) if "acc_norm" in first else None,
        "filters": [_filtered(sample, judge) for sample in samples] if len(samples) > 1 else None,
    } | _judged(first, judge)
    answers, target = first["filtered_resps"], first["target"]
    if output_type == "loglikelihood_rolling":
        return row | {"log_prob": float(answers[0])}
    if output_type == "generate_until":
        gold = (target[0] if target else None) if isinstance(target, list) else target
        return row | {"gold": None if gold is None else str(gold), "prediction": str(answers[0])}
    scores = [float(score) for score, _ in answers]
    best = max(range(len(scores)), key=scores.__getitem__)
    choices: Sequence[str] = [arguments[1].strip() for arguments in first["arguments"]]
    if output_type != "multiple_choice" or isinstance(target, list):  # the greedy one, or none
        said = next((choice for choice, (_, greedy) in zip(choices, answers, strict=True) if greedy), None)
        return row | {"gold": choices[best], "prediction": said, "log_prob": scores[best]}
    if inputs is not None:
        choices, target = inputs
    gold_index = place(target, choices)
    row |= {"prediction": choices[best], "prediction_log_prob": scores[best], "choices": len(choices)}
    if gold_index is None:
        return row
    if judge is None:  # none of its metrics is per item, e.g. Matthews' correlation
        row["correct"] = best == gold_index
    wrong = [score for i, score in enumerate(scores) if i != gold_index]
    return row | {
        "gold": choices[gold_index],
        "gold_index": gold_index,
        "log_prob": scores[gold_index],
        **confidence(scores, gold_index),
        "margin": _margin(scores[gold_index], wrong),
        "rank": 1 + sum(score > scores[gold_index] for score in wrong),
    }


def place(target: Any, choices: Sequence[str]) -> int | None:
    """The index of the right choice; None if the document has none, which lm-eval counts as wrong."""
    if isinstance(target, str):
        return choices.index(target.strip()) if target.strip() in choices else None
    return int(target) if isinstance(target, int) and 0 <= target < len(choices) else None


def extra_columns() -> dict[str, pl.DataType]:
    """The columns of such items in addition to those of every suite."""
    answer = {"filter": pl.String(), "prediction": pl.String(), "correct": pl.Boolean()}
    return {
        "gold_index": pl.Int64(),  # index of the right choice; null if answers are not ranked
        "correct_norm": pl.Boolean(),  # by log-probability per character (lm-eval's acc_norm); null where not defined
        "share": pl.Float64(),  # the value of an item that is neither right nor wrong, e.g. a share of probability
        # The answer under each filter, where a task has several; the other columns are of the first.
        "filters": pl.List(pl.Struct(answer)),
    } | columns()


def accuracies(items: pl.DataFrame) -> dict[str, float]:
    """Accuracies over the tasks whose items are right or wrong or have shares; empty without such tasks."""
    judged = items.with_columns(value=pl.coalesce(pl.col("correct").cast(pl.Float64), "share"))
    judged = judged.filter(pl.col("value").is_not_null())
    metrics = {"items": float(items.height)}
    if judged.is_empty():
        return metrics
    by_task = judged.group_by("task").agg(pl.col("value").mean()).sort("task")
    metrics |= {"accuracy": float(judged["value"].mean()), "accuracy_macro": float(by_task["value"].mean())}  # type: ignore[arg-type]
    return metrics | {f"{task}.accuracy": float(value) for task, value in by_task.iter_rows()}


def _judged(sample: Sample, judge: Judge | None) -> dict[str, Any]:
    if judge is None:
        return {}
    metric, column = judge
    return {column: bool(sample[metric]) if column == "correct" else float(sample[metric])}


def _filtered(sample: Sample, judge: Judge | None) -> dict[str, Any]:
    """The answer of one document under one filter."""
    return {
        "filter": sample["filter"],
        "prediction": str(sample["filtered_resps"][0]),
        "correct": _judged(sample, judge).get("correct"),
    }


def _margin(score: float, wrong: Sequence[float]) -> float | None:
    if not wrong:
        return None
    return score - max(wrong) if all(map(math.isfinite, (score, *wrong))) else math.nan
