#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: from_pretrained(gguf_file=...) leaves out settings that the file states, so that another model
# is loaded without a warning: of StarCoder2 the base of the rotary embeddings (rope.freq_base), and of Llama the biases of
# attention, whose tensors lie in the file.
# Why it matters here: GGUF files are read by their own settings, not by transformers' tables alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 gguf==0.19.0 \
  accelerate==1.15.0
cd "$folder"
"$folder/env/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import numpy as np
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM

WIDTH, WORDS = 64, 8


def read(architecture, settings, tensors):
    writer = GGUFWriter("model.gguf", architecture)
    writer.add_string("general.name", "tiny")
    numbers = {"context_length": 32, "embedding_length": WIDTH, "block_count": 1, "feed_forward_length": WIDTH}
    numbers |= {"attention.head_count": 2, "attention.head_count_kv": 2, "vocab_size": WORDS}
    for key, value in numbers.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for key, value in settings.items():
        writer.add_float32(f"{architecture}.{key}", value)
    writer.add_token_list([f"t{i}" for i in range(WORDS)])
    writer.add_tensor("token_embd.weight", np.ones((WORDS, WIDTH), np.float32))
    for name in tensors:
        writer.add_tensor(name, np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf")


coder = read("starcoder2", {"rope.freq_base": 1e6, "attention.layer_norm_epsilon": 1e-5}, [])
llama = read("llama", {"rope.freq_base": 1e4, "attention.layer_norm_rms_epsilon": 1e-5}, ["blk.0.attn_q.bias"])
found = {
    "base that the file states": 1e6,
    "base that is used": coder.config.rope_parameters["rope_theta"],
    "bias in the file": True,
    "bias in the model": llama.model.layers[0].self_attn.q_proj.bias is not None,
}
print(found)
assert found["base that is used"] == 1e4 and not found["bias in the model"]
print("as found")
PYTHON
