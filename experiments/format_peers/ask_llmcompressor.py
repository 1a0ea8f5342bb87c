"""What compressed-tensors decodes, in the environment of llm-compressor: the weights, and logits in float32."""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from ask import answer, keep_weights
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def logits(place: Path, ids):
    """As a network of the decoded weights computes them; it rounds no inputs."""
    told = json.loads((place / "config.json").read_text())
    decoded = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "quantization_config" in told else {}
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **decoded).eval()
    for module in model.modules():
        module.quantization_enabled = False  # the library's switch: inputs are rounded no more
    keep_weights("llmcompressor", place, model.state_dict())
    with torch.no_grad():  # NVFP4 and MXFP4 are decoded to bfloat16, which a network in float32 does not multiply
        return model.float()(torch.from_numpy(ids)).logits.float().numpy()


def versions(place: Path) -> str:
    """Of what read the file."""
    return f"transformers {version('transformers')}, compressed-tensors {version('compressed-tensors')}"


answer("llmcompressor", logits, versions)
