"""Plain transformers, in float32; MXFP4 and NVFP4 in bfloat16, which compressed-tensors makes of them.

Asymmetric integers of compressed-tensors are loaded with `dequantize=True`, without which they do not load.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from ask import answer
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def logits(place, ids):
    """As transformers computes them."""
    file = {"gguf_file": "model.gguf"} if (place / "model.gguf").is_file() else {}
    told = settings_of(place)
    four = told.get("format", "").startswith(("mxfp4", "nvfp4"))
    weights = [group["weights"] for group in told.get("config_groups", {}).values()]
    if not all(one["symmetric"] for one in weights):
        file["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    dtype = torch.bfloat16 if four else torch.float32
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **file).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


def settings_of(place: Path) -> dict:
    """What a file says of its quantization."""
    config = place / "config.json"
    return json.loads(config.read_text()).get("quantization_config", {}) if config.is_file() else {}


def versions(place: Path) -> str:
    """Of what read the file."""
    with_it = "gguf" if (place / "model.gguf").is_file() else settings_of(place)["quant_method"]
    names = ("transformers", with_it)
    return ", ".join(f"{name} {version(name)}" for name in names)


answer("transformers", logits, versions)
