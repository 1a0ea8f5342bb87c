"""Whole runs on a GPU, compared with the same runs on the CPU: seconds of each step, and memory.

    python benchmarks/gpu.py                                  smollm2 on the first GPU; says so if there is none
    python benchmarks/gpu.py --device cpu --model bert_tiny   tries the program itself on a machine without a GPU

Every run is a command that users type, in a process of its own, with an empty cache, so nothing is finished already.
The seconds are those in the run's report.json; they leave out the start of Python and of torch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from side_by_side import write

from knowledge_compression.models.device import Device
from knowledge_compression.results.store import RunStore

ROOT = Path(__file__).parents[1]
CHOICES = {
    "magnitude": ["compression=magnitude"],
    "gptq": ["compression=gptq"],
    "sparsegpt": ["compression=sparsegpt"],
    "int8_dynamic": ["compression=int8_dynamic"],
    "lora": ["compression=magnitude", "recovery=lora", "recovery.training.tokens=32768"],
}
COMMON = ["target=all", "dtype=float32", "corpus.samples=32", "corpus.length=128", "limit=200"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured")
        return
    card = Device.named(options.device).name
    results: dict[str, Any] = {"card": card}
    for name, choices in CHOICES.items():
        on_device, on_cpu = (cost(options.model, device, choices) for device in (options.device, "cpu"))
        results[name] = {"device": on_device, "cpu": on_cpu}
        for step, seconds in on_device["seconds"].items():
            times = on_cpu["seconds"][step] / max(seconds, 1e-9)
            print(f"{name:<14} {step:<12} {seconds:8.2f} s on {card}, {times:6.2f} times as fast as the processor")
    write(f"gpu_{options.model}", results)


def cost(model: str, device: str, choices: list[str]) -> dict[str, Any]:
    """What the compressed run of a command took: ``seconds`` by step, and bytes at the worst moment."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "run.py", f"model={model}", f"device={device}", *COMMON, *choices]
        environment = os.environ | {"KC_CACHE_DIR": f"{folder}/cache"}
        subprocess.run(
            [*command, f"output.dir={folder}/outputs"], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        (run,) = (one for one in RunStore(f"{folder}/outputs") if one.config["choices"]["compression"] != "none")
        return dict(run.report["cost"])


if __name__ == "__main__":
    main()
