"""What recoveries cost at inference, side by side: python benchmarks/recovery.py [--blocks N] [--repeats N]

The same smollm2 weights with nothing, LoRA (unmerged), one prompt, two prompts joined, and Inference-time Dynamic
Prompting over the same two prompts, at batch 16 and 1,024 tokens. Every repeat measures all of them in turn, and ratios
are taken within a repeat. Prompts and LoRA are untrained: what they cost does not depend on their values.

Goals: IDP with two prompts at most 1.10 times one prompt; a prompt not slower than LoRA.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import shared

import knowledge_compression as kc
from knowledge_compression.evaluation.latency import Latency
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.models import Model
from knowledge_compression.models.prompts import NO_PROMPTS
from knowledge_compression.recovery.bank import bank_of, embedding_width
from knowledge_compression.recovery.lora import Lora, add_lora
from knowledge_compression.recovery.prompted_network import Prompted
from knowledge_compression.recovery.selection import ONCE, PER_LAYER
from knowledge_compression.training import TrainingSettings

LENGTHS = (50, 100)  # tokens of the two prompts, as in the paper's Table 1
RATIOS = {  # name: measured, compared with, at most
    "idp per layer / prompt": ("idp per layer", "prompt", 1.10),
    "idp once / prompt": ("idp once", "prompt", 1.10),
    "prompt / lora": ("prompt", "lora", 1.0),
    "lora / none": ("lora", "none", None),
    "prompt / none": ("prompt", "none", None),
    "concat / prompt": ("concat", "prompt", None),
}


def variants(model: Model) -> dict[str, Scorer]:
    torch.manual_seed(0)
    prompts = [torch.randn(n, embedding_width(model)) for n in LENGTHS]

    def made(change: Callable[[Model], object]) -> Scorer:
        other = shared(model)
        changed = change(other)
        return Scorer(other, prompts=changed.prompts if isinstance(changed, Prompted) else NO_PROMPTS)

    return {
        "none": Scorer(shared(model)),
        "lora": made(lambda m: add_lora(m, Lora(TrainingSettings(steps=1), rank=4))),
        "prompt": made(lambda m: Prompted(m, bank_of(m, prompts[1:]))),
        "idp per layer": made(lambda m: Prompted(m, bank_of(m, prompts), PER_LAYER)),
        "idp once": made(lambda m: Prompted(m, bank_of(m, prompts), ONCE)),
        "concat": made(lambda m: Prompted(m, bank_of(m, [torch.cat(prompts)]))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=8, help="blocks of smollm2 that are kept (it has 30)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/recovery.json"))
    arguments = parser.parse_args()

    source = kc.choose("model=smollm2")
    model = source.load(arguments.device)
    model.network.model.layers = model.network.model.layers[: arguments.blocks]
    model.network.config.num_hidden_layers = len(model.network.model.layers)

    measured = variants(model)
    suite = Latency(arguments.batch, arguments.length, decode_tokens=8, repeats=1, warmup=0)
    Latency(arguments.batch, arguments.length, decode_tokens=1, repeats=1, warmup=0).evaluate(measured["none"])
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in measured}
    for repeat in range(arguments.repeats):
        for name, variant in measured.items():
            for metric, value in suite.evaluate(variant).metrics.items():
                figures[name].setdefault(metric, []).append(value)
        print(f"repeat {repeat + 1} of {arguments.repeats} done", flush=True)

    print(f"\n{'':16s}{'prefill s':>12s}{'decode ms':>12s}{'peak MB':>10s}")
    for name, found in figures.items():
        memory = statistics.median(found.get("peak_memory", [float("nan")])) / 1e6
        seconds = statistics.median(found["prefill_seconds"])
        print(f"{name:16s}{seconds:12.3f}{1e3 * statistics.median(found['decode_seconds']):12.2f}{memory:10.0f}")
    results = []
    for label, (one, other, goal) in RATIOS.items():
        for metric in ("prefill_seconds", "decode_seconds"):
            ratios = [a / b for a, b in zip(figures[one][metric], figures[other][metric], strict=True)]
            median, least, most = statistics.median(ratios), min(ratios), max(ratios)
            aim = f"  goal at most {goal:.2f}" if goal and metric == "prefill_seconds" else ""
            print(f"{label:24s}{metric:16s}{median:7.3f}  ({least:.3f} to {most:.3f}){aim}")
            results.append(
                {"ratio": label, "metric": metric, "median": median, "min": least, "max": most, "goal": goal}
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(arguments).items()} | {"threads": torch.get_num_threads()}
    arguments.output.write_text(
        json.dumps({"settings": settings, "ratios": results, "figures": figures}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
