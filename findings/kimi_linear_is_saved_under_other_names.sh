#!/usr/bin/env bash
# transformers 5.23.0: Kimi Linear's feed-forward network in blocks without experts is mlp.* in its authors' files. It is
# read from there, but saved as block_sparse_moe.*, the name of the blocks with experts.
# Seen: a file with the authors' names, loaded and saved again, has three other names.
# Why it matters here: programs that know the authors' names do not find these weights in a saved checkpoint;
# llama.cpp's conversion stops with "Can not map tensor 'model.layers.0.block_sparse_moe.down_proj.weight'".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
import re

from safetensors.torch import load_file, save_file
from transformers import KimiLinearConfig, KimiLinearForCausalLM

SIZES = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 32, "moe_intermediate_size": 32, "num_experts": 2, "num_experts_per_token": 1}
SIZES |= {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "linear_head_dim": 8}
SIZES |= {"linear_num_heads": 2, "layer_types": ["linear_attention", "full_attention"]}
SIZES |= {"mlp_layer_types": ["dense", "sparse"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KimiLinearForCausalLM(KimiLinearConfig(**SIZES)).save_pretrained("theirs")
saved = load_file("theirs/model.safetensors")
theirs = {re.sub(r"layers\.0\.block_sparse_moe\.", "layers.0.mlp.", name): one for name, one in saved.items()}
save_file(theirs, "theirs/model.safetensors", metadata={"format": "pt"})

network, report = KimiLinearForCausalLM.from_pretrained("theirs", output_loading_info=True)
assert not report["missing_keys"] and not report["unexpected_keys"], report
network.save_pretrained("again")
again = load_file("again/model.safetensors")
print("only in the file that was read:", sorted(theirs.keys() - again.keys()))
print("only in the file that was saved:", sorted(again.keys() - theirs.keys()))
assert len(again.keys() - theirs.keys()) == 3, "the names are the authors' now"
print("as found")
PYTHON
