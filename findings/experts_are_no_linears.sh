#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0: the experts of a mixture are three-dimensional parameters, so whatever looks for
# nn.Linear silently skips nearly all of the model.
# Seen: torch's quantize_dynamic({nn.Linear}) and global L1 pruning of every nn.Linear of a small Mixtral reach about a tenth
# of the weights of its blocks, and report nothing.
# Why it matters here: "50 % pruned" would be true of a ninth of the model. Targets are counted over parameters instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import MixtralConfig, MixtralForCausalLM
config = MixtralConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
network = MixtralForCausalLM(config)
blocks = sum(p.numel() for n, p in network.named_parameters() if ".layers." in n and p.dim() > 1)
linear = sum(m.weight.numel() for n, m in network.named_modules() if ".layers." in n and type(m) is torch.nn.Linear)
fused = {n: tuple(p.shape) for n, p in network.named_parameters() if p.dim() == 3}
print(f"{linear} of {blocks} block weights ({linear / blocks:.0%}) are in nn.Linear; fused: {list(fused.items())[:2]}")
assert linear / blocks < 0.2 and fused
quantized = torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, dtype=torch.qint8)
left = sum(p.numel() for n, p in quantized.named_parameters() if ".layers." in n and p.dim() > 1)
assert left / blocks > 0.8, left
print("as found")
PYTHON
