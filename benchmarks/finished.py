"""Asking for finished runs, compared with an older checkout of this program: seconds, and their ratio.

    python benchmarks/finished.py --against DIR                   one run, a sweep of eight, 10,000 runs
    python benchmarks/finished.py --against DIR --runs 500        to see it run

Each checkout first does the runs itself, untimed. Then both are asked for them again, in turn, each time in a process
of
its own: the whole of ``python run.py ...`` from the start of the interpreter to its end. Each checkout's own
``benchmarks/store.py`` makes the store of many runs. Wall time and processor time are printed; on a shared machine,
processor time says more.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import RESULTS, ratio, spread

ROOT = Path(__file__).resolve().parents[1]
RUN = ["model=bert_tiny", "limit=50"]
SWEEP = ["-m", "model=bert_tiny", "limit=50", "target=att,ff", "sparsity=0.2,0.4,0.6,0.8"]
GENERATE = """
import json, pathlib, store, sys
print(json.dumps(store.finished(pathlib.Path(sys.argv[1]), int(sys.argv[2]))))
"""
GOALS = {"a run": 0.25, "a sweep of eight": 0.35, "many runs": 0.6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="a checkout of an older version")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--repeats-of-many", type=int, default=3)
    options = parser.parse_args()
    older = {"older": options.against.resolve()} if options.against else {}
    checkouts = older | {"this": ROOT}
    result: dict[str, object] = {"runs": options.runs, "commits": {name: commit(at) for name, at in checkouts.items()}}
    with tempfile.TemporaryDirectory() as scratch:
        places = {name: Path(scratch) / name for name in checkouts}
        for what, command in (("a run", RUN), ("a sweep of eight", SWEEP), ("many runs", [])):
            asked: dict[str, list[str]] = {}
            for name, checkout in checkouts.items():
                asked[name] = command or ["-m", *made(checkout, places[name] / "many", options.runs)]
                if command:
                    asked[name] = [*command, f"output.dir={places[name] / what.replace(' ', '_')}"]
                    ask(checkout, asked[name], places[name])
            repeats = options.repeats if command else options.repeats_of_many
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
            for turn in range(repeats):
                for name in list(checkouts)[:: 1 if turn % 2 else -1]:
                    seconds[name].append(ask(checkouts[name], asked[name], places[name]))
            result[what] = found = {kind: figures(seconds, i) for i, kind in enumerate(("wall", "processor"))}
            for kind, of in found.items():
                told = {name: f"{v['median']:.2f} ({v['least']:.2f}-{v['most']:.2f})" for name, v in of.items()}
                print(f"{what}, {kind}: {told} (goal {GOALS[what]})", flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "finished.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {RESULTS / 'finished.json'}")


def figures(seconds: dict[str, list[tuple[float, float]]], place: int) -> dict[str, dict[str, float]]:
    """Seconds of each checkout, and this one's over the older one's, round by round."""
    of = {name: [one[place] for one in rounds] for name, rounds in seconds.items()}
    found = {name: spread(values) for name, values in of.items()}
    return found | ({"ratio": ratio(of["this"], of["older"])} if "older" in of else {})


def ask(checkout: Path, arguments: list[str], place: Path) -> tuple[float, float]:
    """Wall and processor seconds of one command."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "KC_CACHE_DIR": str(place / "cache")}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "run.py", *arguments], cwd=checkout, check=True, capture_output=True, env=environment
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def made(checkout: Path, folder: Path, runs: int) -> list[str]:
    """A store of many finished runs; gives the sweep that has them."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "benchmarks")])}
    environment |= {"KC_CACHE_DIR": str(folder.parent / "cache")}
    command = [sys.executable, "-c", GENERATE, str(folder), str(runs)]
    done = subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True, env=environment)
    arguments: list[str] = json.loads(done.stdout.splitlines()[-1])
    return arguments


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
