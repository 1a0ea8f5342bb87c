"""What auto-round decodes: the weights of its layers, and the logits of a network with them in float32."""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from ask import answer, keep_weights
from auto_round.export.export_to_awq.utils import dequantize_gemm
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


def logits(place: Path, ids):
    """As the decoded weights give them; auto-round's own layers multiply in float16."""
    told = json.loads((place / "config.json").read_text())["quantization_config"]
    decode = of_awq if told["packing_format"].endswith("awq") else of_layers
    weights = decode(place, told)
    keep_weights("auto_round", place, weights)
    config = AutoConfig.from_pretrained(place)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).float().eval()
    plain = {
        name: tensor for name, tensor in load_file(place / "model.safetensors").items() if tensor.is_floating_point()
    }
    model.load_state_dict({name: tensor.float() for name, tensor in (plain | weights).items()}, strict=False)
    model.tie_weights()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


def of_layers(place: Path, told: dict) -> dict:
    """The answers of its packed layers to unit vectors: the columns of their weights, in float16."""
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, device_map="cpu").eval()
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    with torch.no_grad():
        return {f"{name}.weight": layer(torch.eye(layer.infeatures)).T.half() for name, layer in packed.items()}


def of_awq(place: Path, told: dict) -> dict:
    """What its own decoder makes of AWQ's tensors, float16, for which it has no layer on a CPU."""
    state = load_file(place / "model.safetensors")
    layers = [name.removesuffix(".qweight") for name in state if name.endswith(".qweight")]
    parts = {layer: [state[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales")] for layer in layers}
    return {f"{name}.weight": dequantize_gemm(*of, told["bits"], told["group_size"]).T for name, of in parts.items()}


answer("auto_round", logits, lambda place: ", ".join(f"{n} {version(n)}" for n in ("auto-round", "transformers")))
