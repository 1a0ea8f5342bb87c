"""Answers under load: how much slower scoring becomes while another process is busy on every core.

    python benchmarks/load.py --data-dir ../shared/data
    python benchmarks/load.py --data-dir ../shared/data --scoring-dtype auto --environments GOMP_SPINCOUNT=300000

The scoring core and stock lm-eval ``HFLM`` answer the same questions of a task, each in a process of its own, which
waits while the others are measured. The core is started as the program starts it (``threads.py``), stock with the
environment as it is; with ``--environments`` the core is also started with each of the given variables instead. The
load is a process that multiplies matrices on as many threads as there are cores (``products``), or one plain loop for
each core (``loops``). Alone, beside one load and beside the other are measured in turn.

Goal: the core slows down by no more than stock does.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from answering import Answering, answer
from side_by_side import ratio, spread, write

ALONE, LOADS = "alone", ("products", "loops")
OURS, STOCK = "ours", "stock"
PRODUCTS = "import torch; a = torch.rand(1024, 1024)\nprint(flush=True)\nwhile True: a @ a"
LOOP = "print(flush=True)\nwhile True: pass"


def started(side: str, variables: dict[str, str], options: argparse.Namespace) -> Answering:
    """A process of one side."""
    command = [sys.executable, __file__, "--side", side, "--tasks", *options.tasks, "--limit", str(options.limit)]
    command += ["--data-dir", options.data_dir, "--scoring-dtype", options.scoring_dtype]
    command += ["--stock-batch", str(options.stock_batch)]
    return Answering(command, os.environ | variables)


@contextmanager
def load(name: str) -> Iterator[None]:
    programs = {ALONE: [], "products": [PRODUCTS], "loops": [LOOP] * (os.cpu_count() or 1)}[name]
    processes = [subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) for text in programs]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it is busy from here on
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def answer_all(options: argparse.Namespace) -> None:
    """Answer the questions once for each line that is read; in a process of its own."""
    if options.side == OURS:
        from knowledge_compression.threads import let_idle_threads_sleep

        let_idle_threads_sleep()
    import torch
    from scoring import requests_of, smollm2

    from knowledge_compression.evaluation.lm import ScorerLM, stock_lm
    from knowledge_compression.evaluation.scoring import Scorer
    from knowledge_compression.models.device import Device

    model = smollm2("float32")
    dtype = Device.of(model.device).product_dtype(options.scoring_dtype, torch.float32, "--scoring-dtype")
    lm = ScorerLM(Scorer(model, dtype=dtype)) if options.side == OURS else stock_lm(Scorer(model), options.stock_batch)
    requests = [request for task in requests_of(options).values() for request in task]
    lm.loglikelihood(requests[:8], disable_tqdm=True)
    answer(lambda _: lm.loglikelihood(requests, disable_tqdm=True))


def main() -> None:
    options = parse()
    if options.side:
        answer_all(options)
        return
    with ExitStack() as ends:
        answering = {OURS: started(OURS, {}, options), STOCK: started(STOCK, {}, options)}
        for text in options.environments:
            variables = dict(item.split("=", 1) for item in text.split())
            answering[f"{OURS} with {text}"] = started(OURS, variables, options)
        for each in answering.values():
            ends.callback(each.end)
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in answering}
        for repeat in range(options.repeats):
            for place in (ALONE, *LOADS):
                with load(place):
                    names = list(answering)
                    for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                        seconds[name].setdefault(place, []).append(answering[name].seconds("all"))
    results = {name: summary(of, seconds[STOCK]) for name, of in seconds.items()}
    for name, result in results.items():
        show(name, result)
    write("load", {"options": vars(options), "seconds": seconds, "results": results})


def summary(of: dict[str, list[float]], stock: dict[str, list[float]]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        "seconds": {place: spread(values) for place, values in of.items()},
        "times_stock": {place: ratio(stock[place], of[place]) for place in of},
        "slows_down": {place: ratio(of[place], of[ALONE]) for place in LOADS},
    }


def show(name: str, result: dict[str, dict[str, dict[str, float]]]) -> None:
    def told(values: dict[str, float]) -> str:
        return f"{values['median']:.2f} ({values['least']:.2f}-{values['most']:.2f})"

    print(f"{name}: alone {told(result['seconds'][ALONE])} s, {told(result['times_stock'][ALONE])} times stock's speed")
    for place in LOADS:
        slower, times = result["slows_down"][place], result["times_stock"][place]
        print(f"  beside {place}: takes {told(slower)} times as long, {told(times)} times stock's speed")


def parse() -> argparse.Namespace:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get("KC_DATA_DIR", str(beside)))
    parser.add_argument("--tasks", nargs="+", default=["piqa", "arc_easy"])
    parser.add_argument("--limit", type=int, default=20, help="items a task")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scoring-dtype", default="model", help="of the core's products")
    parser.add_argument("--stock-batch", type=int, default=8)
    parser.add_argument(
        "--environments", nargs="*", default=[], help="VARIABLE=VALUE ..., instead of the program's own"
    )
    parser.add_argument("--side", choices=[OURS, STOCK], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
