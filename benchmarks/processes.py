"""How much faster several processes evaluate one model than one process does, in turn in one run, as JSON.

    python benchmarks/processes.py --model smollm2 --processes 2 --repeats 5

Each of the processes has one thread. They are compared with one process of one thread (the gain of a second core), and
with one process that has as many threads as there are processes (the gain over the default). The answers of all are
compared too. The seconds are wall time, so nothing else should be running.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import psutil
import torch
from side_by_side import in_turn, ratio, spread, write

import knowledge_compression as kc
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.scoring.helpers import Helpers
from knowledge_compression.evaluation.suite import ask


def processor_seconds(helpers: Helpers | None) -> float:
    """Of this process and its helpers so far."""
    times = [psutil.Process(pid).cpu_times() for pid in [os.getpid(), *(helpers.pids if helpers else [])]]
    return sum(of.user + of.system for of in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--relations", nargs="+", default=["capital_of", "currency"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, suite = kc.load(options.model, device="cpu"), kc.choose("eval=atlas", relations=options.relations)
    answers: dict[str, Any] = {}
    worked: dict[str, list[float]] = {}

    def asked(name: str, threads: int, helpers: Helpers | None = None) -> None:
        torch.set_num_threads(threads)
        before = processor_seconds(helpers)
        answers[name] = ask(suite, Scorer(model, helpers=helpers)).items
        worked.setdefault(name, []).append(processor_seconds(helpers) - before)

    count = options.processes
    one, many, several = "1 process, 1 thread", f"1 process, {count} threads", f"{count} processes, 1 thread each"
    with Helpers(count) as helpers:
        torch.set_num_threads(count)  # of which each process has one
        helpers.start(Scorer(model).reader)
        contestants: dict[str, Callable[[], None]] = {
            one: partial(asked, one, 1),
            many: partial(asked, many, count),
            several: partial(asked, several, count, helpers),
        }
        in_turn(contestants, 1)  # warms up
        worked.clear()
        seconds = in_turn(contestants, options.repeats)
    apart = (answers[one]["log_prob"] - answers[several]["log_prob"]).abs().max()
    results = {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times as fast as one process with one thread": ratio(seconds[one], seconds[several]),
        f"times as fast as one process with {count} threads": ratio(seconds[many], seconds[several]),
        f"{count} threads, times as fast as one": ratio(seconds[one], seconds[many]),
        "processors' seconds": {name: spread(values) for name, values in worked.items()},
        "at most times as fast as one thread, by these": count * median(worked[one]) / median(worked[several]),
        "questions": answers[one].height,
        "answers equal to the bit": answers[one].equals(answers[several]),
        "largest difference of a log-probability": apart,
        "the same with as many threads": (answers[many]["log_prob"] - answers[several]["log_prob"]).abs().max(),
    }
    for name, value in results.items():
        print(f"{name}: {value}")
    write("processes", results)


if __name__ == "__main__":
    main()
