"""A store of many finished runs: the time and memory to list, look up and load them for comparison.

    python benchmarks/store.py --runs 10000 --items 500,5000

The folders are those of a run of smollm2 (an item table, a report with its 210 layers). The store writes one, which is
copied with other settings and answers; item files are hard links to a few. Each step has a process of its own, with the
files in the page cache. It is repeated for each number of items, and nothing else differs, so memory that grows with
the items would show. ``compare`` loads every run and matches it to its dense baseline; ``accuracy`` then reads the
column of right and wrong answers of each run, one run after the other.

``command`` is the whole of ``python run.py -m ...`` over a sweep whose runs are all finished, in wall time and
processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from side_by_side import spread, write

ROOT = Path(__file__).resolve().parents[1]
LAYERS, KINDS = 210, 8  # kinds of answers: item files that the runs share
STEPS = ("imports", "list", "resume", "load", "compare", "accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--items", default="500,5000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(measured(options.store, options.step)))
        return
    result: dict[str, object] = {"runs": options.runs}
    with tempfile.TemporaryDirectory() as scratch:
        for items in map(int, options.items.split(",")):
            store = Path(scratch) / str(items)
            generate(store, options.runs, items)
            for step in STEPS:
                found = [in_a_process(store, step) for _ in range(options.repeats)]
                assert step == "imports" or {one["found"] for one in found} == {options.runs}
                result[f"{step}, {items} items"] = {
                    "seconds": spread([one["seconds"] for one in found]),
                    "peak_bytes": spread([one["peak_bytes"] for one in found]),
                }
            shutil.rmtree(store)
        arguments = finished(Path(scratch) / "sweep", options.runs)
        result["command"] = [in_one_command(arguments) for _ in range(options.repeats)]
    write("store", result)


def in_a_process(store: Path, step: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--store", str(store), "--step", step]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(folder: Path, step: str) -> dict[str, float]:
    from knowledge_compression.analysis.comparisons import compare
    from knowledge_compression.results.store import RunStore

    store = RunStore(folder)
    ids = json.loads((folder / "ids.json").read_text())

    def accuracy() -> int:
        groups = list(compare(list(store)))
        shares = [group.correct(run).mean() for group in groups for run in (group.dense, *group.runs)]
        assert 0 < np.mean(shares) < 1
        return len(shares)

    steps: dict[str, Callable[[], int]] = {
        "imports": lambda: 0,
        "list": lambda: sum(1 for entry in os.scandir(store.runs_folder) if entry.name in store),
        "resume": lambda: sum(run_id in store for run_id in ids),
        "load": lambda: len([run.metrics["atlas.accuracy"] for run in list(store)]),
        "compare": lambda: sum(1 + len(group.runs) for group in compare(list(store))),
        "accuracy": accuracy,
    }
    start = time.perf_counter()
    found = steps[step]()
    seconds = time.perf_counter() - start
    return {"found": found, "seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def in_one_command(arguments: list[str]) -> dict[str, float]:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "run.py", "-m", *arguments], cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "processor_seconds": processor}


def finished(folder: Path, runs: int) -> list[str]:
    """All runs of a sweep and their dense ones; gives the sweep's overrides."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    from knowledge_compression.results.store import RunStore
    from knowledge_compression.sweeping.combinations import Composer, combinations
    from knowledge_compression.sweeping.parts import Parts

    sparsities = ",".join(f"{(i + 1) / 100}" for i in range(50))
    arguments = ["model=smollm2", "target=att,ff", "compression=random", f"sparsity={sparsities}"]
    arguments += [f"seed=range({max(1, runs // 100)})", f"output.dir={folder}"]
    generate(folder, KINDS, items=500)
    store = RunStore(folder)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        jobs = combinations(OverridesParser.create().parse_overrides(arguments))
        composer = Composer(loader, loader.load_configuration("config", [], RunMode.MULTIRUN), jobs)
        parts = Parts()
        for number, job in enumerate(jobs):
            experiment = parts.experiment(composer(job))
            for one, kind in ((experiment.dense(), 0), (experiment, 1 + number % (KINDS - 1))):
                if one.id not in store:
                    copy(store.runs_folder / f"{kind:016x}", store.runs_folder / one.id, dict(one.settings))
    return arguments


def copy(source: Path, target: Path, config: dict[str, object]) -> None:
    """A run folder with other settings."""
    target.mkdir()
    for path in source.iterdir():
        if path.name in ("items.parquet", "layers.json", "environment.json"):
            os.link(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
    (target / "config.yaml").write_text(yaml.dump(config, Dumper=yaml.CSafeDumper, sort_keys=False))


def generate(folder: Path, runs: int, items: int) -> None:
    """A dense run and its comparisons."""
    from knowledge_compression.evaluation.suite import accuracy_metrics, item_table
    from knowledge_compression.results.store import Run, RunStore

    store = RunStore(folder)
    random = np.random.default_rng(0)
    choices = {"model": "smollm2", "target": "att", "compression": "none", "recovery": "none", "corpus": "self"}
    atlas = {"limit": None, "candidates": "typed", "wordings": "rotate", "calibrate": True, "top_k": [10]}
    config = {"choices": choices, "eval": {"atlas": atlas}, "seed": 0, "sparsity": 0.0, "compression": {}}
    layer = {"path": "", "role": "ff", "parameters": 884736, "removed": 176947, "bits": 32.0, "overhead_bits": 0}
    layer |= {"error_before": None, "error_after": None, "damping": None, "fallbacks": [], "seconds": 0.01}
    layers = [layer | {"path": f"model.layers.{i // 7}.mlp.{i % 7}"} for i in range(LAYERS)]
    report = {"model": {"name": "smollm2", "family": "decoder", "note": ""}, "recovery": {}}
    report |= {"compression": {"sparsity": 0.2, "layers": layers}, "eval": {"atlas": {"fingerprint": "f"}}}
    ids = []
    for kind in range(KINDS):
        rows = [
            {"suite": "atlas", "task": f"r{i % 20}", "id": f"r{i % 20}/{i}", "prompt": f"The capital of {i} is"}
            | {
                "gold": "here",
                "prediction": "there",
                "correct": bool(random.random() < 0.6),
                "log_prob": -random.random(),
            }
            for i in range(items)
        ]
        table = item_table(rows)
        ids.append(f"{kind:016x}")
        chosen = choices | ({"compression": "magnitude"} if kind else {})
        metrics = {f"atlas.{name}": value for name, value in accuracy_metrics(table).items()}
        store.write(Run(ids[-1], config | {"choices": chosen}, metrics, report, {}, None, table))
    for number in range(KINDS, runs):
        kind = 1 + number % (KINDS - 1)
        target = store.runs_folder / f"{number:016x}"
        own = config | {"choices": choices | {"compression": "magnitude"}, "sparsity": number / runs}
        copy(store.runs_folder / ids[kind], target, own)
        ids.append(target.name)
    (folder / "ids.json").write_text(json.dumps(ids))


if __name__ == "__main__":
    main()
