"""LAMA on an encoder, against the loop of The Cost of Compression: python benchmarks/lama.py [--data-dir DIR]

The paper's loop pads every sentence to 512 tokens, computes logits over the vocabulary at every position, and takes the
best token at the mask. Ours is the suite itself, from sentences to ranked items. Both start from the same strings, run
on the same model, and must give the same top-1 answers. An answer may differ only if the two best tokens are closer
than the rounding of float32 (these are counted).

The sentences are T-REx's masked evidences in DIR, $KC_DATA_DIR or ../shared/data; without them, the embedded atlas in
all its wordings, whose sentences are shorter and flatter the ratio. The loop is slow, so it gets evenly spaced items of
those that ours answers, and seconds per item are compared. Each repeat times both, one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

import knowledge_compression as kc
from knowledge_compression.evaluation.atlas import Atlas
from knowledge_compression.evaluation.calibration import Questions, sampled
from knowledge_compression.evaluation.cloze import MASK, Cloze
from knowledge_compression.evaluation.lama import Lama
from knowledge_compression.evaluation.probe import Probe
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.models import Model

GOALS = {"bert_tiny": 130.0, "bert_base_shape": 13.0}
# Items for ours, items for the paper's loop, and the batch sizes that the loop may choose from.
SIZES = {"bert_tiny": (4096, 96, (4, 16, 32)), "bert_base_shape": (256, 16, (1, 4, 16))}
ROUNDING = 1e-4  # logits


@torch.inference_mode()
def papers_loop(model: Model, sentences: Sequence[str], batch_size: int) -> tuple[list[str], list[float]]:
    """The best token at the mask of each sentence, and by how much it leads the second."""
    tokenizer, words, leads = model.tokenizer, [], []
    for start in range(0, len(sentences), batch_size):
        texts = [sentence.replace(MASK, tokenizer.mask_token) for sentence in sentences[start : start + batch_size]]
        inputs = tokenizer(texts, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
        logits = model.network(**inputs).logits
        for row, ids in zip(logits, inputs["input_ids"], strict=True):
            best = row[ids.tolist().index(tokenizer.mask_token_id)].topk(2)
            words.append(tokenizer.decode([int(best.indices[0])]).strip().lower())
            leads.append(float(best.values[0] - best.values[1]))
    return words, leads


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bert_base_shape(tiny: Model) -> Model:
    """BERT-base's shape with random weights and bert_tiny's tokenizer, which is BERT's."""
    torch.manual_seed(0)
    network = BertForMaskedLM(BertConfig(vocab_size=tiny.network.config.vocab_size)).eval()
    return Model(network, tiny.tokenizer, "bert_base_shape")


def compare(model: Model, clozes: Sequence[Cloze], repeats: int) -> dict[str, object]:
    """Time both ways ``repeats`` times, after making sure that they answer alike."""
    items, slow_items, batch_sizes = SIZES[model.name]
    clozes = sampled(clozes, items)
    few = sampled(clozes, slow_items)
    sentences = [cloze.sentence for cloze in few]
    probe = Probe("full", lower_case=True, keep_long=True)
    ours = {
        row["id"]: row["prediction"] for row in probe.ask("lama", Scorer(model), Questions(clozes, {})).items.to_dicts()
    }

    papers_loop(model, sentences[:2], 2)
    each = {size: seconds(lambda size=size: papers_loop(model, sentences[:16], size)) for size in batch_sizes}
    batch_size = min(each, key=each.__getitem__)  # the loop gets the batch size that suits it best
    words, leads = papers_loop(model, sentences, batch_size)
    differ = [lead for cloze, word, lead in zip(few, words, leads, strict=True) if ours[cloze.id] != word]
    assert all(lead < ROUNDING for lead in differ), f"{model.name}: other top-1 answers, leads {differ}"

    ratios, fast, slow = [], [], []
    for _ in range(repeats):
        fast.append(seconds(lambda: probe.ask("lama", Scorer(model), Questions(clozes, {}))) / len(clozes))
        slow.append(seconds(lambda: papers_loop(model, sentences, batch_size)) / len(few))
        ratios.append(slow[-1] / fast[-1])
    return {
        "model": model.name,
        "goal": GOALS[model.name],
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ms_per_item": 1e3 * statistics.median(fast),
        "ms_per_item_papers_loop": 1e3 * statistics.median(slow),
        "papers_batch_size": batch_size,
        "items": len(clozes),
        "items_papers_loop": len(few),
        "same_top1": len(few) - len(differ),
        "top1_within_rounding": len(differ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    default = Path(os.environ.get("KC_DATA_DIR", beside))
    parser.add_argument("--data-dir", type=Path, default=default, help="a folder with lama/TREx/*.jsonl")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/lama.json"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=list(GOALS), choices=list(GOALS))
    arguments = parser.parse_args()

    tiny = kc.choose("model=bert_tiny").load("cpu", "float32")
    real = (arguments.data_dir / "lama" / "TREx").is_dir()
    suite = Lama(str(arguments.data_dir), ["TREx"], "sentence") if real else Atlas(wordings="all")
    source = "T-REx, masked sentences" if real else "the atlas, all wordings"
    clozes = suite.clozes()
    print(f"sentences: {source}")
    results = []
    for name in arguments.models:
        result = compare(tiny if name == "bert_tiny" else bert_base_shape(tiny), clozes, arguments.repeats)
        results.append(result)
        print(
            f"{name}: {result['ratio_median']:.1f}x (of {arguments.repeats}: {result['ratio_min']:.1f}-"
            f"{result['ratio_max']:.1f}; goal {result['goal']:.0f}x); {result['ms_per_item']:.3f} against "
            f"{result['ms_per_item_papers_loop']:.1f} ms an item; same top-1 on {result['same_top1']} of "
            f"{result['items_papers_loop']}"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"sentences": source, "threads": torch.get_num_threads(), "torch": torch.__version__, "results": results}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
