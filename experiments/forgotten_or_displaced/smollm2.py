"""What LoRA and a prompt bring back of smollm2 at 3-bit GPTQ, within minutes on a CPU.

    python experiments/forgotten_or_displaced/smollm2.py DIR [--tokens N]

DIR holds local data (docs/data.md). The model is compressed once, calibrated and tuned on C4; perplexity is that of
WikiText-2 in evenly spaced windows. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import time
from copy import deepcopy

import knowledge_compression as kc
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.corpora.c4 import C4
from knowledge_compression.evaluation.perplexity import Perplexity
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.models import Model, Target
from knowledge_compression.recovery.lora import Lora
from knowledge_compression.recovery.prompt import Prompt
from knowledge_compression.training import TrainingSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("--tokens", type=int, default=100_000, help="budget of each recovery")
    parser.add_argument("--window", type=int, default=512, help="tokens in a perplexity window")
    parser.add_argument("--limit", type=int, default=74, help="perplexity windows")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    arguments = parser.parse_args()

    suite = Perplexity(window=arguments.window, limit=arguments.limit, data_dir=arguments.data_dir)
    model = kc.choose("model=smollm2").load("auto")

    def row(name: str, scorer: Scorer, parameters: int = 0, tokens: int = 0, seconds: float = 0.0) -> None:
        metrics = suite.evaluate(scorer).metrics
        error = metrics.get("perplexity_stderr", float("nan"))
        sys.stdout.write(
            f"| {name} | {parameters:,} | {tokens:,} | {seconds:.0f} | {metrics['perplexity']:.2f} +- {error:.2f} |\n"
        )
        sys.stdout.flush()

    sys.stdout.write("| smollm2 | trained parameters | tokens | seconds | WikiText-2 perplexity |\n")
    sys.stdout.write("| --- | --- | --- | --- | --- |\n")
    row("dense", Scorer(model))
    start = time.perf_counter()
    calibration = C4(samples=arguments.samples, length=512, data_dir=arguments.data_dir).windows(model)
    target = Target("all", ["decoder_self_att", "ff"])
    Gptq(bits=3).compress(model, target.select(model), calibration)
    row("GPTQ, 3 bits", Scorer(model), seconds=time.perf_counter() - start)

    text = C4(length=256, data_dir=arguments.data_dir)
    shared = {"tokens": arguments.tokens, "batch_size": 2, "checkpoint_every": 20}
    recoveries = {
        "GPTQ, 3 bits + LoRA rank 4": Lora(TrainingSettings(learning_rate=5e-4, **shared), rank=4),
        "GPTQ, 3 bits + prompt of 26": Prompt(TrainingSettings(learning_rate=1e-2, **shared), tokens=26),
    }
    for name, strategy in recoveries.items():
        weights = {id(t): t for t in [*model.network.parameters(), *model.network.buffers()]}
        copy = Model(deepcopy(model.network, weights), model.tokenizer, model.name)
        recovered = strategy.recover(copy, text)
        report = recovered.report
        row(name, Scorer(copy, prompts=recovered.prompts), report.trainable_parameters, report.tokens, report.seconds)


if __name__ == "__main__":
    main()
