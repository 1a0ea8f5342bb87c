#!/usr/bin/env bash
# transformers 5.23.0: T5Config(tie_word_embeddings=False) gives a configuration in which tie_word_embeddings is True,
# and a network whose head is the embeddings.
# Seen: the value that was passed is replaced without a warning. A T5 1.1 or Flan-T5, whose checkpoints have a head of
# their own, is told apart only by that head when it is loaded.
# Why it matters here: what is counted, compressed and saved as the final layer depends on whether it is tied; the
# configuration cannot be asked.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
from transformers import T5Config, T5ForConditionalGeneration

config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=False)
network = T5ForConditionalGeneration(config)
print("asked for False, configuration says", config.tie_word_embeddings)
assert config.tie_word_embeddings is True, "the configuration keeps what it was given now"
assert network.lm_head.weight is network.shared.weight
print("as found")
PYTHON
