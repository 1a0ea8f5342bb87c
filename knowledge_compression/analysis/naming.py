"""The size of a recovery, and the order in which runs are listed."""

from __future__ import annotations

from typing import Any

from knowledge_compression.analysis.comparisons import is_dense
from knowledge_compression.results.store import Run


def recovery_name(run: Run) -> str:
    """The recovery with its size: the rank of LoRA, the lengths of prompts; e.g. ``idp 26+100``."""
    strategy = run.config["choices"]["recovery"]
    return " ".join([strategy, "+".join(map(str, recovery_size(run)))]).strip()


def recovery_size(run: Run) -> tuple[int, ...]:
    """The settings that decide a recovery's size: the rank of LoRA, the lengths of prompts; empty if there are none."""
    settings = run.config.get("recovery") or {}
    if "prompts" in settings:
        return tuple(settings["prompts"])
    return tuple(settings[key] for key in ("rank", "tokens") if key in settings)


def reading_order(run: Run) -> tuple[Any, ...]:
    """The order in which runs are listed: the dense one first, then by method and amount."""
    choices = run.config["choices"]
    done = [choices.get(key, "") for key in ("target", "compression", "recovery")]
    compression = run.config["compression"]
    numbers = tuple(value for value in compression.values() if isinstance(value, int | float))
    how_much = run.config["sparsity"] or 0, -(compression.get("bits") or 0), recovery_size(run), numbers
    return choices["model"], not is_dense(run), *done, *how_much, run.config["seed"] or 0, run.id
