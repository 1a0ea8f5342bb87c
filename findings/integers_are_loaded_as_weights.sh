#!/usr/bin/env bash
# transformers 5.23.0: a checkpoint in which a weight is stored as int8 (codes without their scale, and no
# quantization_config) is loaded into the float network by a plain cast.
# Seen: from_pretrained gives no warning, reports nothing missing, unexpected or mismatched, and the weight holds
# numbers such as -30 and 127.
# Why it matters here: a folder that lost its quantization settings on the way loads as a model whose answers are noise,
# and would be scored as a valid result. The dtypes in the files have to be looked at.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).save_pretrained("model")
weights = load_file("model/model.safetensors")
name = "model.layers.0.mlp.up_proj.weight"
weights[name] = (weights[name] / weights[name].abs().max() * 127).round().to(torch.int8)
save_file(weights, "model/model.safetensors", {"format": "pt"})
network, report = LlamaForCausalLM.from_pretrained("model", output_loading_info=True)
largest = network.get_parameter(name).abs().max().item()
print("largest weight", largest, {kind: len(names) for kind, names in report.items()})
assert largest == 127, "integers are no longer taken for weights"
assert not any(report.values()), "the report says something now"
print("as found")
PYTHON
