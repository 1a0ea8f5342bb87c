#!/usr/bin/env bash
# torch 2.13.0 with transformers 5.23.0 on a CPU: a Mixtral in float32 whose experts are 170 wide cannot be run with the
# default implementation of experts (grouped_mm); one that is 176 wide can.
# Seen: RuntimeError 'strides should be multiple of 16 bytes' in the forward pass. With
# set_experts_implementation('eager') the same network runs.
# Why it matters here: a mixture whose width is no multiple of 4, such as one that was pruned in width, loads and then
# fails at its first token, although nothing is wrong with its weights. Structured pruning of experts should keep to
# multiples of 16 bytes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import MixtralConfig, MixtralForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)


def mixture(width: int) -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(intermediate_size=width, num_local_experts=4, **sizes))


ids = torch.tensor([[1, 2, 3]])
mixture(176)(ids)
network = mixture(170)
try:
    network(ids)
except RuntimeError as error:
    print(error)
    assert "multiple of 16 bytes" in str(error)
else:
    raise SystemExit("experts 170 wide run now")
network.set_experts_implementation("eager")
assert network(ids).logits.isfinite().all()
print("as found")
PYTHON
