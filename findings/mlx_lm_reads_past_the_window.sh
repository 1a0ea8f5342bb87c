#!/usr/bin/env bash
# mlx-lm 0.32.2 gives Mistral and Gemma 2 no sliding window: with the same floats as in transformers 5.23.0, logits are equal as far as
# the window of config.json reaches, and another model's from the next token on.
# Why it matters here: what a model that was converted for MLX answers to a text longer than its window (4,096 tokens in
# Mistral 7B v0.1 and Gemma 2) is not what the published model answers, whatever its codes. Files of mlx-lm are read with the window.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 transformers==5.23.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cd "$folder"
"$folder/env/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import AutoConfig, AutoModelForCausalLM

mx.set_default_device(mx.cpu)
WINDOW = 16
ids = torch.arange(2 * WINDOW)[None]
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
sizes |= {"num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.3, "sliding_window": WINDOW}
for kind in ("mistral", "gemma2"):
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    network.save_pretrained(kind)
    settings = json.loads(Path(kind, "config.json").read_text())
    settings |= {"rope_theta": 10000.0, "tie_word_embeddings": network.config.tie_word_embeddings}
    Path(kind, "config.json").write_text(json.dumps(settings))
    theirs = np.array(load_model(Path(kind))[0](mx.array(ids.numpy())))
    apart = np.abs(network(ids).logits.detach().numpy() - theirs).max((0, 2))
    print(f"{kind}: logits differ by {apart[:WINDOW].max():.1g} within the window, by {apart[WINDOW:].max():.1g} after it")
    assert apart[:WINDOW].max() < 1e-3 and apart[WINDOW:].max() > 0.1
PYTHON
echo "as found"
