"""Runs built by hand, whose answers are known."""

from __future__ import annotations

import itertools

import numpy as np

from knowledge_compression.evaluation.suite import item_table
from knowledge_compression.results.store import Run

_COUNTER = itertools.count()


def made_run(
    correct, *, compression="magnitude", target="att", sparsity=0.2, recovery="none", family="decoder", **rest
):
    """A run whose items were right or wrong as told."""
    tasks = rest.get("tasks", ("r0", "r1", "r2"))
    rows = [
        {"suite": "atlas", "task": tasks[i % len(tasks)], "id": str(i), "prompt": f"q{i}", "gold": "a"}
        | {"prediction": "a" if right else "b", "correct": bool(right), "rank": 1 if right else 5, "log_prob": -1.0}
        for i, right in enumerate(correct)
    ]
    choices = {"model": "m", "target": target, "compression": compression, "recovery": recovery, "corpus": "self"}
    pruned = {"sparsity": sparsity} if compression not in ("none", "int8_dynamic") else {}
    return Run(
        id=rest.get("id", f"run{next(_COUNTER):04d}"),
        config={"choices": choices, "eval": {"atlas": rest.get("settings", {})}, "seed": 0, "sparsity": sparsity}
        | {"reading": "module", "compression": pruned},
        metrics={"atlas.accuracy": float(np.mean(correct))},
        report={"model": {"name": "m", "family": family}, "compression": pruned}
        | {"recovery": rest.get("recovered", {"strategy": recovery})}
        | {"eval": {"atlas": {"fingerprint": rest.get("fingerprint", "f")}}},
        environment={"dtype": "float32"},
        _items=item_table(rows),
    )


def bits(text: str) -> np.ndarray:
    return np.array([c == "1" for c in text])
