"""The scoring core as it is here against that of an earlier commit.

    python benchmarks/against_commit.py COMMIT --data-dir ../shared/data --limit 30 --repeats 3

The commit is checked out into a temporary folder (a worktree of git, removed at the end) and runs in this environment.
Each contestant is a process of its own that loads smollm2 and BERT-base's shape (random weights), answers everything
once to warm up, and then answers one task whenever it is told to: the six tasks of ``scoring.py``, and
LAMA's sentences as in ``lama.py``. They are told in turn, so only one of them computes at a time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from answering import Answering, answer
from side_by_side import in_turn, ratio, spread, write

HERE = Path(__file__).resolve().parents[1]
TASKS = ["boolq", "piqa", "winogrande", "arc_easy", "arc_challenge", "hellaswag"]
LAMA = "lama"
BEFORE, NOW = "before", "now"


def contestant(name: str, code: Path, options: argparse.Namespace) -> Answering:
    """A process with the code of one side."""
    command = [sys.executable, __file__, options.commit, "--side", name, "--limit", str(options.limit)]
    command += ["--tasks", *options.tasks, "--data-dir", options.data_dir, "--scoring-dtype", options.scoring_dtype]
    # The package and the helpers of that commit; from here only what it lacks.
    paths = os.pathsep.join(map(str, (code / "benchmarks", code, HERE / "benchmarks")))
    return Answering(command, os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}, code)


def works(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What a contestant can be told to do, by task."""
    import torch
    from lama import SIZES, bert_base_shape
    from scoring import requests_of, smollm2

    import knowledge_compression as kc
    from knowledge_compression.evaluation.calibration import Questions, sampled
    from knowledge_compression.evaluation.lama import Lama
    from knowledge_compression.evaluation.lm import ScorerLM
    from knowledge_compression.evaluation.probe import Probe
    from knowledge_compression.evaluation.scoring import Scorer
    from knowledge_compression.models import Model
    from knowledge_compression.models.device import Device

    def scorer(model: Model) -> Scorer:
        dtype = Device.of(model.device).product_dtype(options.scoring_dtype, torch.float32, "--scoring-dtype")
        return Scorer(model, dtype=dtype)

    found: dict[str, Callable[[], object]] = {}
    if tasks := [task for task in options.tasks if task != LAMA]:
        lm = ScorerLM(scorer(smollm2("float32")))
        asked = requests_of(argparse.Namespace(tasks=tasks, data_dir=options.data_dir, limit=options.limit))
        found |= {task: lambda of=of: lm.loglikelihood(of, disable_tqdm=True) for task, of in asked.items()}
    if LAMA not in options.tasks:
        return found
    encoder = bert_base_shape(kc.choose("model=bert_tiny").load("cpu", "float32"))
    clozes = sampled(Lama(options.data_dir, ["TREx"], "sentence").clozes(), SIZES["bert_base_shape"][0])
    probe, reads = Probe("full", lower_case=True, keep_long=True), scorer(encoder)
    return found | {LAMA: lambda: probe.ask(LAMA, reads, Questions(clozes, {}))}


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "code"
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main() -> None:
    options = parse()
    if options.side:
        to_do = works(options)
        for work in to_do.values():
            work()
        answer(lambda task: to_do[task]())
        return
    with checked_out(options.commit) as folder, ExitStack() as ends:
        contestants = {}
        for name, code in {BEFORE: folder, NOW: HERE}.items():
            contestants[name] = contestant(name, code, options)
            ends.callback(contestants[name].end)
        rounds, results = {}, {}
        for task in options.tasks:
            turns = {name: lambda one=one, task=task: one.seconds(task) for name, one in contestants.items()}
            rounds[task] = in_turn(turns, options.repeats)
            results[task] = compared(task, rounds[task])
    if harness := [rounds[task] for task in options.tasks if task != LAMA]:
        summed = {name: [sum(of) for of in zip(*(each[name] for each in harness), strict=True)] for name in contestants}
        results["together"] = compared("together", summed)
    write("against_commit", {"options": vars(options), "rounds": rounds, "results": results})


def compared(task: str, seconds: dict[str, list[float]]) -> dict[str, object]:
    took, times = {name: spread(of) for name, of in seconds.items()}, ratio(seconds[BEFORE], seconds[NOW])
    told = f"{times['median']:.2f}x ({times['least']:.2f}-{times['most']:.2f})"
    print(f"{task:14} before {took[BEFORE]['median']:6.2f} s  now {took[NOW]['median']:6.2f} s  {told}", flush=True)
    return {"seconds": took, "times_before": times}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default="60e1a61", help="of this repository's history")
    parser.add_argument("--tasks", nargs="+", default=[*TASKS, LAMA], choices=[*TASKS, LAMA])
    parser.add_argument("--data-dir", default=os.environ.get("KC_DATA_DIR", str(HERE.parent / "shared" / "data")))
    parser.add_argument("--limit", type=int, default=30, help="items a task")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scoring-dtype", default="auto", help="of the products")
    parser.add_argument("--side", choices=[BEFORE, NOW], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
