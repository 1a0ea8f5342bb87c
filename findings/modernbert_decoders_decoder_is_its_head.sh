#!/usr/bin/env bash
# transformers 5.23.0: get_decoder() of ModernBERT's decoder returns the projection to the vocabulary, an nn.Linear that happens to be
# called decoder, and not the stack of blocks that it returns for other causal models.
# Why it matters here: code that asks a causal model for its body, to read states before the head, gets logits or an error. Here
# a body must contain the blocks.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/env/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
for kind in ("llama", "modernbert-decoder"):
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    decoder = network.get_decoder()
    print(f"{kind}: get_decoder() is {type(decoder).__name__}, the body {type(network.base_model).__name__}")
    assert isinstance(decoder, nn.Linear) is (kind == "modernbert-decoder")
PYTHON
echo "as found"
