"""The page of a large store: its size, the time to make it, and the time until a browser shows it.

    python benchmarks/page.py --facts 129 --relations 60 --wordings 3 --runs 20   # BEAR's size
    python benchmarks/page.py --facts 1182 --relations 1 --wordings 1 --runs 300  # the atlas under many settings

The product's own writer writes the store, with answers drawn at random: right with the setting's probability, with
scores, shares and ranks as a suite gives them. Opening needs Chromium. It ends when the page says that it is ready;
then a search is typed into the fact explorer, until its results appear.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
from side_by_side import write

from knowledge_compression.evaluation.suite import item_table
from knowledge_compression.results.store import Run, RunStore


def main() -> None:
    options = parse()
    with TemporaryDirectory() as scratch:
        folder = Path(options.store or scratch)
        if not (folder / "runs").is_dir():
            fill(RunStore(folder), options)
        page = folder / "report.html"
        start = time.process_time()
        subprocess.run(
            [sys.executable, "-m", "knowledge_compression", "report", str(folder), "-o", str(page)], check=True
        )
        made = time.process_time() - start
        opened = opening(page, options.repeats)
        found = {"megabytes": page.stat().st_size / 1e6, "opened": opened, "parent_seconds": made}
    print({name: value for name, value in found.items() if name != "opened"})
    for name, seconds in opened.items():
        print(f"{name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f})")
    write("page", {"options": vars(options)} | found)


def fill(store: RunStore, options: argparse.Namespace) -> None:
    draw = np.random.default_rng(0)
    rows = [
        {"suite": "bear", "task": f"P{relation}", "id": f"P{relation}/Q{fact}/{wording}"}
        | {"prompt": f"The {relation}th relation of the subject {draw.integers(10**6)} in wording {wording} is [MASK]."}
        | {"gold": f"answer {fact % 25}", "fact": f"P{relation}/Q{fact}", "wording": str(wording), "choices": 25}
        for relation in range(options.relations)
        for fact in range(options.facts)
        for wording in range(options.wordings)
    ]
    hard = draw.random(len(rows))
    for number in range(options.runs):
        rate = 0.0 if number == 0 else 0.9 * number / options.runs
        store.write(run_of(rows, number, rate, hard, draw))


def run_of(rows: list[dict[str, Any]], number: int, sparsity: float, hard: Any, draw: np.random.Generator) -> Run:
    right = hard + draw.normal(0, 0.1, len(rows)) > 0.4 + sparsity / 2
    scores = -draw.exponential(30.0, len(rows))
    wrong = draw.integers(0, 25, len(rows))
    items = item_table(
        [
            row
            | {"correct": bool(known), "rank": 1 if known else int(2 + said % 24), "log_prob": float(score)}
            | {"prediction": row["gold"] if known else f"answer {said}", "prediction_log_prob": float(score) / 2}
            | {"margin": 1.0 if known else -1.0}
            for row, known, score, said in zip(rows, right.tolist(), scores, wrong.tolist(), strict=True)
        ],
        {"fact": pl.String(), "wording": pl.String()},
    )
    name = "magnitude" if number else "none"
    choices = {"model": "m", "target": "all" if number else "none", "compression": name, "recovery": "none"}
    pruned = {"sparsity": sparsity} if number else {}
    return Run(
        id=f"{number:016x}",
        config={"choices": choices | {"corpus": "self"}, "eval": {"bear": {}}, "seed": 0, "sparsity": sparsity}
        | {"reading": "module", "compression": pruned},
        metrics={"bear.accuracy": float(right.mean())},
        report={"model": {"name": "m", "family": "decoder"}, "compression": pruned, "recovery": {"strategy": "none"}}
        | {"eval": {"bear": {"fingerprint": "f"}}},
        environment={"dtype": "float32"},
        _items=items,
    )


def opening(page: Path, repeats: int) -> dict[str, list[float]]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    found: dict[str, list[float]] = {"ready": [], "searched": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(repeats):
            tab = browser.new_page()
            tab.set_default_timeout(300_000)
            start = time.perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_selector("body[data-ready=yes]")
            found["ready"].append(time.perf_counter() - start)
            before = tab.locator("#fact-count").inner_text()
            start = time.perf_counter()
            tab.fill("#fact-search", "p7 answer")
            tab.wait_for_function("before => document.querySelector('#fact-count').innerText !== before", arg=before)
            found["searched"].append(time.perf_counter() - start)
            tab.close()
        browser.close()
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--relations", type=int, default=60)
    parser.add_argument("--facts", type=int, default=129, help="of each relation")
    parser.add_argument("--wordings", type=int, default=3)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store", help="a folder to keep the store in; a temporary one without it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
