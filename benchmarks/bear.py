"""``eval=[bear]``, compared with its reference implementation: scores, ranks and time.

    pip install --no-deps --target DIR lm-pub-quiz==0.3.3
    PYTHONPATH=.:DIR python benchmarks/bear.py --data-dir ../shared/data --relations P30 P36 --facts 20
    PYTHONPATH=.:DIR python benchmarks/bear.py --data-dir ../shared/data --model bert_tiny --relations P30 P36

Both score the same facts in all templates, in turn, starting from strings, with the same network in float32. The
reference is timed with each of ``--batch-sizes`` (1 is its default). Every answer's score must lie within 1e-3 nats of
the reference's, and every fact's right answer must have the same rank. Otherwise the script ends with status 1; for a
decoder it prints how far both are from the network in float64, and how far the network in float32 is when it reads one
and two copies at once. ``--facts`` facts of each relation are taken, evenly spaced, because the reference is slow; ours
gets faster per fact the more there are. ``--scoring-dtype auto`` also times ours with bfloat16 products, if the device
is faster with them, and counts the ranks that differ then. ``--processor-seconds`` counts processor time, for a shared
machine (then with ``--threads 1``).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_pub_quiz import Dataset, Evaluator  # not a dependency of this project
from side_by_side import in_turn, ratio, spread, write

import knowledge_compression as kc
from knowledge_compression.evaluation.bear import Bear
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.sentences import Statement, scores_of_answers
from knowledge_compression.models import Model
from knowledge_compression.models.device import PRODUCT_DTYPES, Device
from knowledge_compression.models.families import DECODER

CLOSE = 1e-3  # nats
OURS, NARROW = "ours", "ours, bfloat16"
MODELS = {
    "smollm2": kc.choose("model=smollm2"),
    "bert_tiny": kc.choose("model=bert_tiny"),
}


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = MODELS[options.model].load("cpu", "float32")
    results = {name: measure(model, name, options) for name in options.relations}
    for name, result in results.items():
        print(f"{name}: {told(result)}")
    rounds = {
        who: [sum(result["rounds"][who][i] for result in results.values()) for i in range(options.repeats)]
        for who in next(iter(results.values()))["rounds"]
    }
    whole = compared(rounds) | {"items": sum(result["items"] for result in results.values())}
    for key in ("answers", "other_ranks", "other_ranks_in_bfloat16"):
        whole[key] = sum(result[key] for result in results.values())
    whole["furthest"] = max(result["furthest"] for result in results.values())
    print(f"all: {told(whole)}")
    write(f"bear_{options.model}", {"options": vars(options), "relations": results, "all": whole})
    sys.exit(0 if whole["furthest"] <= CLOSE and not whole["other_ranks"] else 1)


def measure(model: Model, name: str, options: argparse.Namespace) -> dict[str, Any]:
    folder = Path(options.data_dir) / "bear" / "BEAR"
    relation = Dataset.from_path(folder)[name].activated()
    chosen = np.unique(
        np.linspace(0, len(relation) - 1, min(options.facts or len(relation), len(relation))).astype(int)
    )
    theirs = relation.filter_subset(chosen.tolist(), keep_answer_space=True)
    kind = "CLM" if model.family == DECODER else "MLM"
    evaluator = Evaluator.from_model(model.network, model_type=kind, tokenizer=model.tokenizer, device="cpu")
    suite = Bear(data_dir=options.data_dir, relations=[name])
    (ours,) = suite.parts().values()
    ids = [fact.id for fact in ours.relation.facts]
    ours = replace(ours, asked=frozenset(ids[i] for i in chosen))
    scorer = Scorer(model)
    dtype = Device.of(model.device).product_dtype(options.scoring_dtype, torch.float32, "--scoring-dtype")
    scorers = {OURS: scorer} | ({} if dtype is None else {NARROW: Scorer(model, dtype=dtype)})
    found: dict[str, Any] = {}

    def reference(batch_size: int) -> None:
        found["theirs"] = evaluator.evaluate_relation(theirs, batch_size=batch_size)

    def here(which: str) -> None:
        found[which] = ours.evaluate(scorers[which])

    contestants = {f"lm-pub-quiz, batches of {n}": lambda n=n: reference(n) for n in options.batch_sizes} | {
        which: lambda which=which: here(which) for which in scorers
    }
    clock = time.process_time if options.processor_seconds else time.perf_counter
    rounds = in_turn(contestants, options.repeats, clock)
    narrow = found.get(NARROW, found[OURS]).items["rank"]
    moved = {"other_ranks_in_bfloat16": int((narrow != found[OURS].items["rank"]).sum())}
    return compared(rounds) | differences(scorer, ours, found) | moved


def differences(scorer: Scorer, ours: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Answer by answer, and rank by rank."""
    table = found["theirs"].instance_table
    worst = ("", 0.0, 0.0)  # a sentence, their score and ours
    items = found[OURS].items
    relation = ours.relation
    furthest, other_ranks, answers = 0.0, 0, 0
    facts = {fact.subject: fact for fact in relation.facts}
    statements = [
        Statement(
            "",
            relation.templates[row.template_index].replace("[X]", row.sub_label).replace("[Y]", "[MASK]"),
            relation.answers,
        )
        for row in table.itertuples()
    ]
    ranks = {(item["fact"], item["wording"]): item["rank"] for item in items.iter_rows(named=True)}
    for row, said, mine in zip(table.itertuples(), statements, scores_of_answers(scorer, statements), strict=True):
        scores = np.array(row.pll_scores)
        if (apart := np.abs(scores - mine)).max() > furthest:
            at = int(apart.argmax())
            furthest = float(apart[at])
            worst = (said.sentence.replace("[MASK]", relation.answers[at]), float(scores[at]), float(mine[at]))
        answers += len(scores)
        rank = 1 + sorted(range(len(scores)), key=lambda i: -scores[i]).index(row.answer_idx)
        fact = facts[row.sub_label]
        other_ranks += rank != ranks[f"{relation.name}/{fact.id}", str(row.template_index)]
    if furthest > CLOSE and scorer.model.family == DECODER:
        print(by_float64(scorer.model, *worst))
    return {"items": items.height, "answers": answers, "furthest": furthest, "other_ranks": other_ranks}


def by_float64(model: Model, sentence: str, theirs: float, ours: float) -> str:
    """How far the scores of a sentence are from the same network's in float64."""
    begin = model.tokenizer.bos_token_id
    ids = [begin, *(i for i in model.tokenizer(sentence).input_ids if i != begin)]

    def score(network: Any, copies: int) -> float:
        with torch.inference_mode():
            logits = network(torch.tensor([ids] * copies)).logits[0].double().log_softmax(-1)
        return sum(float(logits[i - 1, ids[i]]) for i in range(1, len(ids)))

    true = score(deepcopy(model.network).double(), 1)
    off = {"lm-pub-quiz": theirs, "ours": ours} | {f"float32, {n} at once": score(model.network, n) for n in (1, 2)}
    told = ", ".join(f"{who} {value - true:+.1e}" for who, value in off.items())
    return f"{sentence!r}: {true:.5f} nats in float64; {told}"


def compared(rounds: dict[str, list[float]]) -> dict[str, Any]:
    times = {
        f"{ours} than {theirs}": ratio(rounds[theirs], rounds[ours])
        for ours in (OURS, NARROW)
        for theirs in rounds
        if ours in rounds and theirs not in (OURS, NARROW)
    }
    return {"rounds": rounds, "seconds": {who: spread(seconds) for who, seconds in rounds.items()}, "times": times}


def told(result: dict[str, Any]) -> str:
    times = "; ".join(f"{one['median']:.1f} times ({who})" for who, one in result["times"].items())
    return (
        f"{result['items']} items, {result['answers']} answers, furthest {result['furthest']:.1e} nats, "
        f"{result['other_ranks']} other ranks ({result['other_ranks_in_bfloat16']} between ours and ours in bfloat16); "
        f"ours {result['seconds'][OURS]['median']:.2f} s, faster {times}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--data-dir", default=os.environ.get("KC_DATA_DIR", "../shared/data"))
    parser.add_argument("--relations", nargs="+", default=["P30", "P36", "P103"])
    parser.add_argument("--facts", type=int, help="facts of each relation; all without it")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--scoring-dtype", choices=("model", *PRODUCT_DTYPES), default="model", help="of its products")
    parser.add_argument("--processor-seconds", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
