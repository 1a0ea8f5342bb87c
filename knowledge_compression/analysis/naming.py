"""What a reader knows a run by."""

from __future__ import annotations

from typing import Any

from knowledge_compression.analysis.comparisons import is_dense
from knowledge_compression.results.store import Run


def label(run: Run) -> str:
    """How a reader tells a run from its neighbours, e.g. ``smollm2 att magnitude 40 %``."""
    choices = run.config["choices"]
    if is_dense(run):
        return f"{choices['model']} dense"
    sparsity = run.report.get("compression", {}).get("sparsity", 0.0)
    parts = [choices["model"], choices["target"], choices["compression"], f"{sparsity:.0%}" if sparsity else ""]
    return " ".join(part for part in [*parts, choices["recovery"]] if part and part != "none")


def reading_order(run: Run) -> tuple[Any, ...]:
    """What to sort runs by so that a reader finds them: the dense one first, then by what was done and how much."""
    choices = run.config["choices"]
    done = [choices.get(key, "") for key in ("target", "compression", "recovery")]
    return choices["model"], not is_dense(run), *done, run.config["sparsity"], run.config["seed"], run.id
