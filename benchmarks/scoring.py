"""The scoring core, compared with stock lm-eval HFLM and with this machine's rate of matrix products.

    python benchmarks/scoring.py --data-dir ../shared/data --limit 200 --repeats 3
    python benchmarks/scoring.py --data-dir ../shared/data --limit 200 --scoring-dtype auto
    python benchmarks/scoring.py --data-dir ../shared/data --limit 200 --dtype bfloat16 --against float32

Both score the same requests of the same tasks, in turn; the seconds are those of ``loglikelihood`` alone, with
tokenization. The limit is the time of the necessary multiply-adds as bare matrix products of the model's own shapes
(``products.py``): every token of a token tree once, the head only where a log-probability is read; by torch's own
choice of library, and by the faster one here. The peak of memory is that of one more pass over the requests, above what
was resident before it.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from products import Products
from side_by_side import in_turn, ratio, spread, write

import knowledge_compression as kc
from knowledge_compression.evaluation.lm import ScorerLM, stock_lm
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.tasks import load_tasks
from knowledge_compression.memory import peak_memory
from knowledge_compression.models import Model
from knowledge_compression.models.device import PRODUCT_DTYPES, Device

TASKS = ["boolq", "piqa", "winogrande", "arc_easy", "arc_challenge", "hellaswag"]


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    ours = smollm2(options.dtype)
    theirs = smollm2(options.against)  # scored in its own type
    dtype = Device.of(ours.device).product_dtype(options.scoring_dtype, torch.float32, "--scoring-dtype")
    fast = ScorerLM(Scorer(ours, dtype=dtype))
    results = {}
    for task, requests in requests_of(options).items():
        results[task] = measure(fast, theirs, requests, options)
        print(line(task, results[task]), flush=True)
    rounds = {
        name: [sum(result["rounds"][name][i] for result in results.values()) for i in range(options.repeats)]
        for name in ("stock", "fast", "limit", "torch_limit")
    }
    results["all"] = compared(rounds)
    print(line("all", results["all"]))
    scored_in = str(dtype or ours.dtype).removeprefix("torch.")
    write(f"scoring_{scored_in}_against_{options.against}", {"options": vars(options), "tasks": results})


def measure(fast: ScorerLM, theirs: Model, requests: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One task: stock at its best batch size, the core, and the limit, in turn."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    stock, size = best_stock(theirs, requests[: max(1, len(requests) // 4)], options.stock_batches)
    limit, torch_limit = (products_of(fast, requests, fastest=fastest) for fastest in (True, False))
    answers: dict[str, Any] = {}

    def run(name: str, lm: Any) -> None:
        answers[name] = lm.loglikelihood(requests, disable_tqdm=True)

    fast.loglikelihood(requests[:8], disable_tqdm=True)  # warm
    with peak_memory(theirs.device) as peak:
        fast.loglikelihood(requests, disable_tqdm=True)
    contestants = {
        "stock": lambda: run("stock", stock),
        "fast": lambda: run("fast", fast),
        "limit": limit.multiply,
        "torch_limit": torch_limit.multiply,
    }
    result = compared(in_turn(contestants, options.repeats, clock))
    pairs = list(zip(answers["stock"], answers["fast"], strict=True))
    return result | {
        "requests": len(requests),
        "peak_bytes": peak.bytes,
        "stock_batch": size,
        "tokens": limit.tokens,
        "reads": limit.reads,
        "largest_relative_difference": max(abs(a - b) / abs(a) for (a, _), (b, _) in pairs),
        "greedy_flags_that_differ": sum(a != b for (_, a), (_, b) in pairs),
        "choices_that_differ": sum(
            a != b for a, b in zip(*(chosen(requests, answers[n]) for n in answers), strict=True)
        ),
    }


def chosen(requests: Any, answers: Any) -> list[int]:
    """For each item its likeliest choice."""
    scores: dict[int, list[float]] = {}
    for request, (score, _) in zip(requests, answers, strict=True):
        scores.setdefault(request.doc_id, []).append(score)
    return [max(range(len(of)), key=of.__getitem__) for of in scores.values()]


def compared(rounds: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds and ratios, each as median and spread over the rounds."""
    return {
        "seconds": {name: spread(values) for name, values in rounds.items()},
        "times_stock": ratio(rounds["stock"], rounds["fast"]),
        "times_limit": ratio(rounds["fast"], rounds["limit"]),
        "times_torch_limit": ratio(rounds["fast"], rounds["torch_limit"]),
        "rounds": rounds,
    }


def best_stock(model: Model, requests: Any, sizes: list[int]) -> tuple[Any, int]:
    """Stock HFLM at the batch size that scores some of the requests fastest."""
    stocks = {size: stock_lm(Scorer(model), size) for size in sizes}
    if len(stocks) > 1:
        tries = {str(size): partial(lm.loglikelihood, requests, disable_tqdm=True) for size, lm in stocks.items()}
        seconds = in_turn(tries, 1)
        sizes = sorted(sizes, key=lambda size: seconds[str(size)][0])
    return stocks[sizes[0]], sizes[0]


def products_of(lm: ScorerLM, requests: Any, *, fastest: bool) -> Products:
    """The matrix products that some requests need."""
    questions, _ = lm.questions_of(tokenized(lm, requests))
    trees = lm.scorer.trees_of(questions)
    reads = sum(len(set(tree.nodes.tolist())) for tree in trees)
    return Products(lm.scorer, list(map(len, trees)), reads, lm.scorer.budget.tokens, fastest=fastest)


def tokenized(lm: ScorerLM, requests: Any) -> list[Any]:
    """What the language model would score, caught on its way."""
    caught: list[Any] = []

    def catch(made: list[Any], **_: Any) -> list[tuple[float, bool]]:
        caught.extend(made)
        return [(0.0, False)] * len(made)

    lm._loglikelihood_tokens = catch  # type: ignore[method-assign]
    lm.loglikelihood(requests)
    del lm._loglikelihood_tokens
    return caught


def requests_of(options: argparse.Namespace) -> dict[str, Any]:
    loaded = load_tasks(options.tasks, options.data_dir).tasks
    for task in loaded.values():
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=options.limit)
    return {name: task.instances for name, task in loaded.items()}


def smollm2(dtype: str) -> Model:
    return kc.choose("model=smollm2").load("cpu", dtype)


def line(task: str, result: dict[str, Any]) -> str:
    seconds, stock = result["seconds"], result["times_stock"]
    limit, torch_limit = result["times_limit"], result["times_torch_limit"]
    text = (
        f"{task:14} stock {seconds['stock']['median']:7.2f} s  fast {seconds['fast']['median']:7.2f} s  "
        f"{stock['median']:5.2f}x ({stock['least']:.2f}-{stock['most']:.2f})  "
        f"{torch_limit['median']:.2f} of torch's products ({torch_limit['least']:.2f}-{torch_limit['most']:.2f}), "
        f"{limit['median']:.2f} of the fastest ({limit['least']:.2f}-{limit['most']:.2f})"
    )
    if "largest_relative_difference" in result:
        text += f"  largest difference {result['largest_relative_difference']:.1e}"
        text += f"  choices that differ {result['choices_that_differ']}"
        text += f"  peak {(result['peak_bytes'] or 0) / 2**20:.0f} MiB above the model"
    return text


def parse() -> argparse.Namespace:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=os.environ.get("KC_DATA_DIR", str(beside)))
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--limit", type=int, default=40, help="items a task")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="of the scoring core")
    parser.add_argument("--scoring-dtype", choices=("model", *PRODUCT_DTYPES), default="model", help="of its products")
    parser.add_argument("--against", default="float32", help="dtype of stock")
    parser.add_argument("--threads", type=int, default=0, help="0 takes torch's own number")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor seconds")
    parser.add_argument("--stock-batches", type=int, nargs="+", default=[4, 8, 16, 32], help="the best is taken")
    return parser.parse_args()


if __name__ == "__main__":
    main()
