"""Plain transformers, in float32."""

from importlib.metadata import version
from pathlib import Path

import torch
from ask import answer
from transformers import AutoModelForCausalLM


def logits(place, ids):
    """As transformers computes them."""
    file = {"gguf_file": "model.gguf"} if (place / "model.gguf").is_file() else {}
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **file).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


def versions(place: Path) -> str:
    """Of what read the file."""
    names = ("transformers", "gguf" if (place / "model.gguf").is_file() else "compressed-tensors")
    return ", ".join(f"{name} {version(name)}" for name in names)


answer("transformers", logits, versions)
