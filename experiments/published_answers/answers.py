"""The published answers of all models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from knowledge_compression.analysis.comparisons import KEY, items_of
from knowledge_compression.analysis.ledger import GAINED, LOST
from knowledge_compression.results.store import Run

SUITE = "published"
MODELS = {  # smallest first
    "Qwen/Qwen2.5-1.5B-Instruct": "Qwen2.5-1.5B",
    "google/gemma-2-2b-it": "Gemma-2-2B",
    "Qwen/Qwen2.5-3B-Instruct": "Qwen2.5-3B",
    "meta-llama/Llama-3.2-3B-Instruct": "Llama-3.2-3B",
    "microsoft/Phi-3.5-mini-instruct": "Phi-3.5-mini",
}
PRECISIONS = {8.0: "int8", 4.0: "int4"}
BENCHMARKS = {"arc": "ARC-Challenge", "mmlu": "MMLU", "csqa": "CommonsenseQA"}
FIFTHS = 5  # parts of the confidence to show

Key = tuple[str, str, str]  # model, precision, benchmark


@dataclass(frozen=True)
class Answers:
    """Everything that follows is read from here: arrays ``[models, items]`` over all benchmarks, in one order.

    Attributes:
        items: ``task, id`` of each item.
        known: whether the uncompressed model is right.
        sure: its probability for its answer.
        fate, changed: by precision, the fate of each item and whether the answer is another.
    """

    items: pl.DataFrame
    known: NDArray[np.bool_]
    sure: NDArray[np.float64]
    fate: dict[str, NDArray[np.str_]]
    changed: dict[str, NDArray[np.bool_]]

    @cached_property
    def task(self) -> NDArray[np.str_]:
        """The benchmark of each item."""
        return self.items["task"].to_numpy()

    @cached_property
    def others_wrong(self) -> NDArray[np.int64]:
        """How many of the other uncompressed models are wrong: how hard an item is, whatever this model says."""
        wrong = ~self.known
        return wrong.sum(0) - wrong

    @cached_property
    def fifth(self) -> NDArray[np.int64]:
        """In which fifth of its model's confidence on its benchmark an item is; 0 holds the least sure answers."""
        return self.part(FIFTHS)

    def part(self, parts: int) -> NDArray[np.int64]:
        """In which of equally large parts by its model's confidence on its benchmark an item is."""
        found = np.empty(self.sure.shape, int)
        for task in BENCHMARKS:
            there = self.task == task
            ranks = stats.rankdata(self.sure[:, there], method="ordinal", axis=1) - 1
            found[:, there] = ranks * parts // there.sum()
        return found

    def flipped(self, precision: str) -> NDArray[np.bool_]:
        """Whether each item is a flip: right to wrong, or wrong to right."""
        return np.isin(self.fate[precision], [LOST, GAINED])


def arrays(runs: Sequence[Run], ledgers: dict[Key, pl.DataFrame]) -> Answers:
    """The answers of all models side by side.

    Raises:
        ValueError: a model lacks an item.
    """
    dense = {run.config["choices"]["model"]: run for run in runs if run.config["choices"]["compression"] == "none"}
    items = items_of(dense[next(iter(MODELS))], SUITE).select(KEY).collect()
    known, sure = [], []
    for model in MODELS:
        told = items_of(dense[model], SUITE).select(*KEY, "correct", "prediction_log_prob").collect()
        beside = items.join(told, on=KEY, how="left", maintain_order="left")
        if beside["correct"].null_count():
            raise ValueError(f"{model} lacks items")
        known.append(beside["correct"].to_numpy())
        sure.append(np.exp(beside["prediction_log_prob"].to_numpy()))
    fate, changed = {}, {}
    for precision in PRECISIONS.values():
        tables = [pl.concat([ledgers[model, precision, task] for task in BENCHMARKS]) for model in MODELS]
        whole = [items.join(table, on=KEY, how="left", maintain_order="left") for table in tables]
        fate[precision] = np.stack([table["fate"].to_numpy() for table in whole])
        changed[precision] = np.stack([table["changed"].to_numpy() for table in whole])
    return Answers(items, np.stack(known), np.stack(sure), fate, changed)
