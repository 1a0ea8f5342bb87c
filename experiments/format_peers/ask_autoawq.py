"""What AutoAWQ decodes: the weights of its packed layers, and the logits of a network with them in float32."""

import json
from importlib.metadata import version

import torch
from ask import answer, keep_weights
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


def logits(place, ids):
    """As the decoded weights give them; AutoAWQ's own layers multiply in float16."""
    told = json.loads((place / "config.json").read_text())["quantization_config"]
    config = AutoConfig.from_pretrained(place)
    del config.quantization_config
    state = load_file(place / "model.safetensors")
    for name in [name for name in state if name.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        packed = [state.pop(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales")]
        state[f"{layer}.weight"] = dequantize_gemm(*packed, told["bits"], told["group_size"]).T
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    model.tie_weights()
    keep_weights("autoawq", place, state)
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


answer("autoawq", logits, lambda place: f"autoawq {version('autoawq')}, transformers {version('transformers')}")
