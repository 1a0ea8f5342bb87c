"""How much faster a shallower or narrower model is scored than the whole one, side by side in one process, as JSON.

    python benchmarks/smaller.py --model smollm2 --sparsity 0.25 --repeats 3

The text that decides which blocks and channels go is short: it decides quality, not speed. Ratios are of the medians of
rounds in which each model is asked the same facts in turn; sizes are of the saved checkpoints.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

import knowledge_compression as kc
from knowledge_compression.models.saving import save_checkpoint


def main() -> None:
    """Print the seconds and sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--relations", nargs="+", default=["capital_of"])
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    suite, target = kc.choose("eval=atlas", relations=asked.relations), kc.choose("target=all")
    models = {"dense": kc.load(asked.model)}
    text = torch.randint(100, len(models["dense"].tokenizer) - 100, (4, 64), generator=torch.Generator().manual_seed(0))
    told: dict[str, Any] = {"sparsity": asked.sparsity, "threads": torch.get_num_threads()}
    for name in ("depth", "width"):
        models[name] = kc.load(asked.model)
        method = kc.choose(f"compression={name}", sparsity=asked.sparsity)
        report = method.compress(models[name], target.select(models[name]), text)
        told[name] = {
            "reached": report.sparsity,
            "promised_bytes": report.stored_bytes,
            "settings": report.smaller.settings,
        }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(asked.repeats + 1):  # the first warms up
        for name, model in models.items():
            start = time.perf_counter()
            kc.ask(model, suite)
            if round_:
                seconds[name].append(time.perf_counter() - start)
    told["seconds"] = {name: median(values) for name, values in seconds.items()}
    told["times as fast"] = {name: told["seconds"]["dense"] / value for name, value in told["seconds"].items()}
    with TemporaryDirectory() as folder:
        for name, model in models.items():
            save_checkpoint(model, Path(folder) / name)
            told.setdefault("bytes", {})[name] = sum(
                x.stat().st_size for x in (Path(folder) / name).glob("*.safetensors")
            )
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
