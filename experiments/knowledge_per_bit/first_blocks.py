"""How far a quantizer moves the loss of smollm2 when only its first blocks are quantized, and its processor seconds.

    OMP_NUM_THREADS=1 python experiments/knowledge_per_bit/first_blocks.py DIR gptq:bits=3 gptq:bits=3,refine=3

DIR holds local data (docs/data.md). Calibration: `--samples` windows of 512 tokens of C4, seed 0; asked: windows
of 512 tokens of WikiText-2, evenly spaced. Groups of 64. Four blocks, or `--blocks`. Nats are above the dense model's,
with the standard error of the differences over windows.
"""

from __future__ import annotations

import argparse
import resource
from typing import Any

import numpy as np
import yaml

import knowledge_compression as kc
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
from knowledge_compression.models.device import torch_dtype

SMOLLM2 = kc.choose("model=smollm2")


def scales(bits: int = 4, group_size: int | None = None, refine: int = 0, **settings: Any) -> Scales:
    """GPTQ, then all scales together."""
    return Scales(Gptq(bits, group_size=group_size, refine=refine), **settings)


METHODS: dict[str, Any] = {"scales": scales, "rtn": Rtn, "gptq": Gptq, "gptaq": Gptaq, "autoround": AutoRound}


def processor_seconds() -> float:
    """Of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measured(method: Any, asked: argparse.Namespace) -> tuple[np.ndarray, float]:
    """The loss of each window after the compression, and its processor seconds."""
    model = SMOLLM2.load()
    windows = C4(samples=asked.samples, length=512, seed=0, data_dir=asked.data_dir).windows(model)
    blocks = tuple(f"model.layers.{block}." for block in range(asked.blocks))
    layers = [x for x in Target("all", ["decoder_self_att", "ff"]).select(model) if x.path.startswith(blocks)]
    start = processor_seconds()
    method.compress(model, Targets(layers, model, "module"), windows)
    seconds = processor_seconds() - start
    scorer = Scorer(model, dtype=torch_dtype(asked.scored_in))
    items = Perplexity(window=512, limit=asked.windows, data_dir=asked.data_dir).evaluate(scorer).items
    return items["nll"].to_numpy(), seconds


def main() -> None:
    """Measure each choice."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data_dir")
    options.add_argument("choices", nargs="+", metavar="METHOD:SETTING=VALUE,...", help="e.g. gptq:bits=3")
    options.add_argument("--blocks", type=int, default=4)
    options.add_argument("--windows", type=int, default=12, help="asked")
    options.add_argument("--samples", type=int, default=32, help="calibration windows")
    options.add_argument("--scored-in", default="float32", choices=["float32", "bfloat16"])
    asked = options.parse_args()
    dense, _ = measured(NoCompression(), asked)
    for choice in asked.choices:
        name, _, told = choice.partition(":")
        settings = {
            key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in told.split(",") if one)
        }
        found, seconds = measured(METHODS[name](**({"group_size": 64} | settings)), asked)
        rise = found - dense
        error = rise.std(ddof=1) / len(rise) ** 0.5
        print(
            f"{choice}: {rise.mean():.4f} ({error:.4f}) nats above dense, {seconds:.0f} processor seconds", flush=True
        )


if __name__ == "__main__":
    main()
