"""What was removed from the study's models, and which facts each removal lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from knowledge_compression.analysis.comparisons import KEY, Group, compare, items_of
from knowledge_compression.building import build
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import Estimate, accuracy

HELD_OUT = pl.col("asked_as") == "held_out"  # one item a fact, so that items are independent of each other
EXPERTS, SPREAD, ATTENTION, SMALLEST = "one expert", "random, experts", "random, attention", "smallest, experts"
KINDS = (EXPERTS, SPREAD, ATTENTION, SMALLEST)  # as many weights each
BLOCK, WHOLE = "all experts of a block", "all experts"
LAST, EARLIER, NONE = 2, 1, 0  # the tokens of a question that an expert reads: the last one, others only, or none
READS = {LAST: "the last token", EARLIER: "only earlier tokens", NONE: "none"}


@dataclass(frozen=True)
class Removals:
    """Removals of one kind from one model.

    Attributes:
        names: block and, if it is one, number of the expert or of the random draw, for each removal.
        lost: whether the removal lost a fact that the dense model knows: ``[removals, known facts]``.
        fell: fall of the right answer's log-probability in nats, ``[removals, known facts]``.
    """

    names: list[tuple[int, int]]
    lost: NDArray[np.bool_]
    fell: NDArray[np.float64]

    @property
    def each(self) -> NDArray[np.float64]:
        """For each fact, the share of the removals that lose it: ``[known facts]``."""
        return self.lost.mean(axis=0)

    @property
    def times(self) -> NDArray[np.int64]:
        """For each fact, how many of the removals lose it: ``[known facts]``."""
        return self.lost.sum(axis=0)

    def of_block(self, block: int) -> Removals:
        """The removals from one block."""
        chosen = [place for place, (there, _) in enumerate(self.names) if there == block]
        return Removals([self.names[place] for place in chosen], self.lost[chosen], self.fell[chosen])


@dataclass(frozen=True)
class Model:
    """One trained mixture and everything that was removed from it.

    Attributes:
        seed: of its training.
        source: its settings, from which it can be loaded.
        relations, bins, prompts: of each known fact.
        removals: by kind.
        dense: share of all facts that it knows.
    """

    seed: int
    source: Mapping[str, Any]
    relations: NDArray[Any]
    bins: NDArray[Any]
    prompts: list[str]
    removals: dict[str, Removals]
    dense: Estimate

    @cached_property
    def blocks(self) -> list[int]:
        """Numbers of the blocks."""
        return sorted({block for block, _ in self.removals[EXPERTS].names})


def kind_of(run: Run) -> tuple[str, tuple[int, int]] | None:
    """What kind of removal a run is, and its block and number."""
    target, choices = run.config["target"], run.config["choices"]
    (block,) = target["blocks"] or [0]
    match choices["target"], choices["compression"], target["experts"]:
        case "experts", "ablation", None if target["blocks"] is None:
            return WHOLE, (0, 0)
        case "experts", "ablation", [expert]:
            return EXPERTS, (block, expert)
        case "experts", "ablation", None:
            return BLOCK, (block, 0)
        case "experts", "random", None:
            return SPREAD, (block, run.config["seed"])
        case "att", "random", None:
            return ATTENTION, (block, run.config["seed"])
        case "experts", "magnitude", None:
            return SMALLEST, (block, 0)
    return None


def models(store: Path) -> list[Model]:
    """The models of a store, with the removals from each."""
    groups = compare([run.only(HELD_OUT) for run in RunStore(store)])
    return sorted((model_of(group) for group in groups), key=lambda model: model.seed)


def model_of(group: Group) -> Model:
    """The removals from one model, in the order of block and number."""
    known = group.correct(group.dense)
    facts = group.items.join(
        items_of(group.dense, group.asked.suite).select(*KEY, "bin", "prompt", "log_prob").collect(),
        on=KEY,
        maintain_order="left",
    )
    before = facts["log_prob"].to_numpy()
    found: dict[str, list[tuple[tuple[int, int], Run]]] = {}
    for run in group.members:
        if run.config["choices"]["compression"] != "none" and (kind := kind_of(run)):
            found.setdefault(kind[0], []).append((kind[1], run))
    removals = {}
    for kind, runs in found.items():
        runs.sort(key=lambda named: named[0])
        falls = [before - log_probs(group, run) for _, run in runs]
        lost = [~group.correct(run)[known] for _, run in runs]
        removals[kind] = Removals([name for name, _ in runs], np.stack(lost), np.stack(falls)[:, known])
    relations, bins = facts["task"].to_numpy()[known], facts["bin"].to_numpy()[known]
    prompts, source = facts["prompt"].filter(known).to_list(), group.dense.config["model"]
    seed = group.dense.report["model"]["made"]["recipe"]["training"]["seed"]
    return Model(seed, source, relations, bins, prompts, removals, accuracy(known))


def log_probs(group: Group, run: Run) -> NDArray[np.float64]:
    """Log-probability of the right answer to each item, in the dense run's order."""
    said = items_of(run, group.asked.suite).select(*KEY, "log_prob").collect()
    return group.items.join(said, on=KEY, how="left", maintain_order="left")["log_prob"].to_numpy()


def reads_of(model: Model) -> NDArray[np.int64]:
    """Which tokens of each question every expert of the dense model reads: ``[experts, known facts]``."""
    loaded = build("model", model.source).load("cpu")
    questions = [loaded.tokenizer(prompt.partition("[MASK]")[0])["input_ids"] for prompt in model.prompts]
    chosen: dict[int, NDArray[Any]] = {}
    for block, layer in enumerate(loaded.network.model.layers):
        layer.mlp.gate.register_forward_hook(
            lambda _, __, routed, block=block: chosen.update({block: routed[-1].numpy()})
        )
    names = model.removals[EXPERTS].names
    reads = np.full((len(names), len(questions)), NONE)
    for length in {len(question) for question in questions}:
        places = [place for place, question in enumerate(questions) if len(question) == length]
        with torch.inference_mode():
            loaded.network(input_ids=torch.tensor([questions[place] for place in places]))
        for row, (block, expert) in enumerate(names):
            read = (chosen[block] == expert).any(axis=-1).reshape(len(places), length)
            # The first token begins every text and says nothing about the fact.
            reads[row, places] = np.where(read[:, -1], LAST, np.where(read[:, 1:-1].any(axis=1), EARLIER, NONE))
    return reads
