"""LAMA on encoders and perplexity of a decoder, compared with the matrix products that they need.

    python benchmarks/limit.py --data-dir DIR

Each suite is timed from sentences (or text) to its finished item table, and so is its scoring core alone. In turn, the
bare products are timed for the same rows that the suite reads. Harness tasks are in ``scoring.py``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lama import SIZES, bert_base_shape
from products import Products
from side_by_side import in_turn, ratio, spread, write

import knowledge_compression as kc
from knowledge_compression.evaluation.calibration import Questions, sampled
from knowledge_compression.evaluation.cloze import reader_of
from knowledge_compression.evaluation.lama import Lama
from knowledge_compression.evaluation.perplexity import Perplexity
from knowledge_compression.evaluation.probe import Probe
from knowledge_compression.evaluation.scoring import Question, Scorer
from knowledge_compression.models import Model

Contestants = dict[str, Callable[[], Any]]


def lama(model: Model, data_dir: Path) -> Contestants:
    clozes = sampled(Lama(str(data_dir), ["TREx"], "sentence").clozes(), SIZES[model.name][0])
    probe, scorer = Probe("full", lower_case=True, keep_long=True), Scorer(model)
    blanks = [blank for blank in reader_of(scorer).blanks(clozes) if blank is not None]

    def score() -> None:
        for _ in scorer.distributions(blanks):
            pass

    return {
        "suite": lambda: probe.ask("lama", scorer, Questions(clozes, {})),
        "scoring": torch.inference_mode()(score),
        **products(scorer, [len(blank.ids) for blank in blanks], len(blanks), scorer.budget.tokens),
    }


def perplexity(model: Model, data_dir: Path, window: int, limit: int) -> Contestants:
    suite, scorer = Perplexity(window=window, limit=limit, data_dir=str(data_dir)), Scorer(model)
    windows = suite.windows(scorer)[0].tolist()
    questions = [Question(row[:1], [row[1:]]) for row in windows]
    return {
        "suite": lambda: suite.evaluate(scorer),
        "scoring": lambda: scorer.log_likelihoods(questions),
        **products(scorer, [window] * limit, (window - 1) * limit, scorer.budget.tokens),
    }


def products(scorer: Scorer, lengths: list[int], reads: int, chunk: int) -> Contestants:
    """By torch's own choice of library, and by the faster one here."""
    return {
        name: Products(scorer, lengths, reads, chunk, fastest=fastest).multiply
        for name, fastest in (("torch's products", False), ("fastest products", True))
    }


def main() -> None:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("KC_DATA_DIR", beside)))
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=8, help="windows of perplexity")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tiny = kc.choose("model=bert_tiny").load("cpu", "float32")
    smollm2 = kc.choose("model=smollm2")
    works = {
        "LAMA, bert_tiny": lambda: lama(tiny, options.data_dir),
        "LAMA, BERT-base's shape": lambda: lama(bert_base_shape(tiny), options.data_dir),
        "perplexity, smollm2": lambda: perplexity(
            smollm2.load("cpu", "float32"), options.data_dir, options.window, options.limit
        ),
    }
    results = {}
    for name, make in works.items():
        contestants = make()
        in_turn(contestants, 1)  # warm
        seconds = in_turn(contestants, options.repeats)
        results[name] = {"seconds": seconds, "times": {}}
        for bare in ("torch's products", "fastest products"):
            shares = {part: ratio(seconds[part], seconds[bare]) for part in ("suite", "scoring")}
            results[name]["times"][bare] = shares
            told = ", ".join(
                f"{part} {s['median']:.2f} ({s['least']:.2f}-{s['most']:.2f})" for part, s in shares.items()
            )
            print(f"{name}: {bare} {spread(seconds[bare])['median']:.3f} s; times that: {told}", flush=True)
    write("limit", {"options": {**vars(options), "data_dir": str(options.data_dir)}, "results": results})


if __name__ == "__main__":
    main()
