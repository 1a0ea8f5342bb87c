"""Times contestants against each other in one run, in turn, so a busy machine slows all of them alike."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from knowledge_compression.models import Model

RESULTS = Path("outputs/benchmarks")


def in_turn(
    contestants: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contestant, once per round; the order rotates from round to round.

    ``clock=time.process_time`` counts the processor's seconds instead of the wall's: with one thread they stay
    comparable on a machine that others are using.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(repeats):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            contestants[name]()
            seconds[name].append(clock() - start)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster, round by round."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def write(name: str, result: Mapping[str, Any]) -> None:
    """Keep the result as ``outputs/benchmarks/<name>.json`` together with the machine it was measured on."""
    import platform

    import torch

    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__, "platform": platform.platform()}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine, **result}, indent=1) + "\n")
    print(f"written to {path}")


def shared(model: Model) -> Model:
    """Another model with the same weights in memory."""
    tensors = [*model.network.parameters(), *model.network.buffers()]
    return Model(deepcopy(model.network, {id(t): t for t in tensors}), model.tokenizer, model.name)
