"""What an importance matrix is worth: smollm2's first four blocks in llama.cpp's mixtures, with and without.

python experiments/gguf_conversion/importance.py --data DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import knowledge_compression as kc
from knowledge_compression.compression.methods.gguf import Gguf
from knowledge_compression.compression.methods.imatrix import Imatrix
from knowledge_compression.models import Target

LENGTH = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Print nats a token above the dense model, with the standard error over windows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with wikitext2 and c4, as docs/data.md says")
    chosen = parser.parse_args(arguments)
    asked = (chosen.data / "wikitext2" / "test.raw.txt").read_text()[20_000:60_000]
    lines = (chosen.data / "c4" / "sample.jsonl").read_text().splitlines()[:30]
    read = " ".join(json.loads(line)["text"] for line in lines)
    dense = torch.zeros(8)
    for mixture in (None, "q2_k_mixed", "q3_k_m"):
        methods: list[Any] = [Gguf(mixture), Imatrix(type=mixture, forward_dtype="float32")] if mixture else [None]
        for method in methods:
            model: Any = kc.load("smollm2")
            windows = windows_of(model, asked, 8)
            if method is not None:
                targets = Target("all", ["decoder_self_att", "ff"], blocks=[0, 1, 2, 3]).select(model)
                method.compress(model, targets, windows_of(model, read, 16) if method.calibrated else None)
            with torch.no_grad():
                scores = model.network(windows).logits.log_softmax(-1)[:, :-1]
            nats = -scores.gather(-1, windows[:, 1:, None])[..., 0].mean(1)
            if method is None:
                dense = nats
                continue
            above = nats - dense
            error = float(above.std() / len(above) ** 0.5)
            print(f"{mixture:12s} {method.name:8s} {float(above.mean()):.4f} ({error:.4f})", flush=True)
    return 0


def windows_of(model: Any, text: str, count: int) -> Any:
    """The first tokens of a text, ``[count, LENGTH]``."""
    return torch.tensor(model.tokenizer(text)["input_ids"][: count * LENGTH]).reshape(count, LENGTH)


if __name__ == "__main__":
    sys.exit(main())
