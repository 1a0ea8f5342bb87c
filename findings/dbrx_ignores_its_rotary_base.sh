#!/usr/bin/env bash
# transformers 5.23.0: DBRX's published configuration states the base of its rotary embeddings as attn_config.rope_theta
# (500000). The network does not compute with it, but with rope_parameters.rope_theta, for which it takes 10000.
# Seen: answers are the same with every attn_config.rope_theta, and differ from those with rope_parameters of the same
# base. A configuration without attn_config.rope_theta, such as the default one, cannot be built at all.
# Why it matters here: weights of DBRX give other answers than those of their authors' code or of llama.cpp, which both
# read attn_config.rope_theta. A GGUF file has one base.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import DbrxConfig, DbrxForCausalLM

SIZES = {"vocab_size": 32, "d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}
SIZES["ffn_config"] = {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1}
words = torch.arange(3, 19)[None]


def made(base, **further):
    torch.manual_seed(0)
    attention = {"clip_qkv": 8, "kv_n_heads": 1} | ({"rope_theta": base} if base else {})
    return DbrxForCausalLM(DbrxConfig(attn_config=attention, initializer_range=0.5, **SIZES, **further)).eval()


def answer(base, **further):
    with torch.no_grad():
        return made(base, **further)(words).logits


published = answer(500000)
print("rope_parameters of the published base:", made(500000).config.rope_parameters)
by_attention = float((answer(10) - published).abs().max())
meant = answer(500000, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
by_parameters = float((meant - published).abs().max())
print(f"attn_config.rope_theta=10 changes logits by {by_attention:.1e}, rope_parameters of 500000 by {by_parameters:.1e}")
assert by_attention == 0, "the network computes with attn_config.rope_theta now"
assert by_parameters > 1e-3, "the network does not compute with rope_parameters any more"
try:
    made(None)
except AttributeError as error:
    print("without attn_config.rope_theta:", error)
else:
    raise AssertionError("a configuration without attn_config.rope_theta is built now")
print("as found")
PYTHON
