"""The memory that a divided model takes while it is loaded and asked: peak resident bytes of a process of its own.

    python experiments/larger_models/peak.py --limit 400

A Llama of 0.2 * 10^9 parameters without training (0.94 GB in float32) is loaded with ``device_map=auto`` and
``max_memory={cpu: LIMIT}``, so the rest lies on disk, and asked eight questions. The script counts the pages that the
process holds beyond those it held with its libraries loaded: all resident ones, and those that are not pages of files
(which the system takes back when it needs them). The promise is at most the limit and one block.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

FIELDS = {"VmRSS": "resident", "RssAnon": "not of files"}
QUESTIONS, TOKENS = 8, 48


def resident() -> dict[str, float]:
    """10^6 bytes that this process holds, by kind."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    told = {words[0].rstrip(":"): words[1] for words in lines if len(words) > 1}
    return {called: int(told[name]) * 1024 / 1e6 for name, called in FIELDS.items()}


class Peaks(threading.Thread):
    """Looks a hundred times a second at what this process holds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = resident()

    def run(self) -> None:
        while True:
            self.most = {name: max(self.most[name], now) for name, now in resident().items()}
            time.sleep(0.01)


def write(folder: Path) -> None:
    """A checkpoint, and smollm2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import knowledge_compression as kc

    tokenizer = kc.load("smollm2", device="cpu").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=8
    )
    with torch.device("meta"):
        network = LlamaForCausalLM(config)
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.fill_(1e-3 * (1 + number % 7))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def ask(folder: Path, limit: int) -> None:
    """Load and ask; print what it took, as JSON. A limit of 0 loads the model whole."""
    import torch

    from knowledge_compression.evaluation.scoring import Question, Scorer
    from knowledge_compression.models.loading import LocalModel
    from knowledge_compression.models.spread import Spread, bytes_by_place

    torch.set_num_threads(1)
    import transformers.models.llama.modeling_llama  # noqa: F401  (a part of the libraries)

    before, peaks = resident(), Peaks()
    peaks.start()
    model = LocalModel("large", str(folder)).load(Spread.over("cpu", {"cpu": f"{limit}MB"}) if limit else "cpu")
    loading = dict(peaks.most)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(10, 1000, (QUESTIONS, TOKENS), generator=draw).tolist()
    Scorer(model).log_likelihoods([Question(row[:-4], [row[-4:]]) for row in rows])
    block = sum(p.numel() * 4 for p in model.network.model.layers[0].parameters()) / 1e6
    print(
        json.dumps(
            {
                "limit": limit,
                "a block": round(block),
                "lies": {name: round(size / 1e6) for name, size in bytes_by_place(model.network).items()}
                if limit
                else "whole",
                "loading": {name: round(loading[name] - before[name]) for name in before},
                "in all": {name: round(peaks.most[name] - before[name]) for name in before},
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, nargs="+", default=[400], help="10^6 bytes of weights in memory; 0: whole")
    parser.add_argument("--folder", type=Path, help="of the checkpoint, in the process that asks")
    options = parser.parse_args()
    if options.folder is not None:
        ask(options.folder, *options.limit)
        return
    with TemporaryDirectory() as scratch:
        write(Path(scratch))
        for limit in options.limit:
            subprocess.run([sys.executable, __file__, "--folder", scratch, "--limit", str(limit)], check=True)


if __name__ == "__main__":
    main()
