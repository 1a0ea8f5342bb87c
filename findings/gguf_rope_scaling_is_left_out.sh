#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: from_pretrained(gguf_file=...) of a LLaMA ignores the scaling of rotary embeddings, both
# the settings llama.rope.scaling.* and the tensor rope_freqs.weight, in which every GGUF file of Llama 3.1 and later holds it.
# Why it matters here: such a model answers differently from its original at every position but the first, without a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import numpy as np, torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM

WIDTH, VOCABULARY = 64, 32
def write(path, further):
    rng = np.random.default_rng(0)
    file = GGUFWriter(path, "llama")
    for name, value in {"context_length": 256, "embedding_length": WIDTH, "block_count": 1, "feed_forward_length": WIDTH,
                        "attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 32, "vocab_size": VOCABULARY}.items():
        file.add_uint32(f"llama.{name}", value)
    file.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    file.add_float32("llama.rope.freq_base", 500000.0)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name in ["token_embd"]:
        file.add_tensor(f"{name}.weight", rng.normal(0, 1, (VOCABULARY, WIDTH)).astype(np.float32))
    for name in names:
        file.add_tensor(f"blk.0.{name}.weight", rng.normal(0, 0.3, (WIDTH, WIDTH)).astype(np.float32))
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]:
        file.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    if further:
        file.add_string("llama.rope.scaling.type", "linear")
        file.add_float32("llama.rope.scaling.factor", 8.0)
        file.add_tensor("rope_freqs.weight", np.full(16, 8, np.float32))
    file.write_header_to_file(); file.write_kv_data_to_file(); file.write_tensors_to_file(); file.close()

ids = torch.arange(20)[None]
logits = []
for further in (False, True):
    write(f"{further}.gguf", further)
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{further}.gguf").eval()
    print(f"scaled: {further}; read as", model.config.rope_parameters)
    assert model.config.rope_parameters["rope_type"] == "default", "it is read now"
    with torch.no_grad():
        logits.append(model(ids).logits)
assert torch.equal(*logits)
print("as found")
PYTHON
