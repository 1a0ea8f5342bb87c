#!/usr/bin/env bash
# transformers 5.23.0: NemotronHConfig has time_step_limit, between which the steps of a state space stay, and
# time_step_min, the smallest step that random weights begin with. The network ignores the former and keeps every step
# above the latter.
# Seen: with time_step_limit=(0.0, inf), as the default is, answers change with time_step_min; another
# time_step_limit changes nothing. Mamba 2 and Granite 4 of the same version keep steps within time_step_limit.
# Why it matters here: llama.cpp does not keep them above anything, so a GGUF file of the same weights gives other
# answers where a step is below 0.001, and no setting of the file can express it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

torch.manual_seed(0)
SIZES = {"vocab_size": 32, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
SIZES |= {"intermediate_size": 32, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1}
SIZES |= {"chunk_size": 8, "layers_block_type": ["mamba", "attention", "mlp"]}
weights = NemotronHForCausalLM(NemotronHConfig(**SIZES)).state_dict()
weights["model.layers.0.mixer.dt_bias"].fill_(-10)  # steps of about 5e-5
weights["model.layers.0.mixer.D"].fill_(0)  # the states alone, without the inputs beside them
weights["model.layers.0.mixer.in_proj.weight"].mul_(20)
words = torch.arange(3, 19)[None]


def answer(**settings):
    network = NemotronHForCausalLM(NemotronHConfig(**SIZES, **settings)).eval()
    network.load_state_dict(weights)
    with torch.no_grad():
        return network(words).logits


usual = answer()
limited = float((answer(time_step_limit=(0.5, 1.0)) - usual).abs().max())
smallest = float((answer(time_step_min=1e-9) - usual).abs().max())
print(f"time_step_limit=(0.5, 1.0) changes logits by {limited:.1e}, time_step_min=1e-9 by {smallest:.1e}")
assert limited == 0, "the network keeps its steps within time_step_limit now"
assert smallest > 1e-4, "the network does not keep its steps above time_step_min any more"
print("as found")
PYTHON
