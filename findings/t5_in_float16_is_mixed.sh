#!/usr/bin/env bash
# transformers 5.23.0: T5 loaded with dtype=float16 keeps the `wo` linears of its feed-forward layers in float32; loaded in
# bfloat16 it does not.
# Why it matters here: a "float16" model does not have 16 bits per weight, autocast rules that look at the first
# parameter guess wrong, and a saved float16 T5 is loaded again in two dtypes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import tempfile, torch
from transformers import T5Config, T5ForConditionalGeneration
config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
with tempfile.TemporaryDirectory() as folder:
    T5ForConditionalGeneration(config).save_pretrained(folder)
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        network = T5ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        wo = {m.weight.dtype for n, m in network.named_modules() if n.endswith(".wo")}
        q = {m.weight.dtype for n, m in network.named_modules() if n.endswith("SelfAttention.q")}
        print(dtype, "wo:", wo, "q:", q)
        assert wo == {expected} and q == {dtype}
print("as found")
PYTHON
