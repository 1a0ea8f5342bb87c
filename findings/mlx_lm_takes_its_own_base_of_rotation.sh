#!/usr/bin/env bash
# transformers 5.23.0 saves the base of rotary embeddings as rope_parameters.rope_theta alone. mlx-lm 0.32.2 finds it there for
# Qwen 3, but not for Qwen 2: it takes that class's default, 1,000,000, without a word, and answers as another network. With
# rope_theta beside rope_parameters it answers as the saved one.
# Why it matters here: answers of a model that was converted for MLX are compared with those of the original. Models that
# this project saves state both, and files of mlx-lm are read with the base that config.json states.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6 transformers==5.23.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
cd "$folder"
cat > look.py <<'PYTHON'
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import AutoConfig, AutoModelForCausalLM

mx.set_default_device(mx.cpu)
ids = torch.arange(40)[None]
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
sizes |= {"num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.3, "tie_word_embeddings": False}


def apart(kind, place):
    """Largest difference between the logits of transformers and of mlx-lm."""
    ours = AutoModelForCausalLM.from_pretrained(place).eval()(ids).logits.detach().numpy()
    theirs = load_model(Path(place))[0](mx.array(ids.numpy()))
    return float(np.abs(ours - np.array(theirs)).max())


for kind in ("qwen2", "qwen3"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **sizes)
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(kind)
    found = apart(kind, kind)
    print(f"{kind} as saved: logits differ by {found:.2g}")
    assert (found > 0.01) is (kind == "qwen2")
    settings = json.loads(Path(kind, "config.json").read_text())
    Path(kind, "config.json").write_text(json.dumps(settings | {"rope_theta": 10000.0}))
    found = apart(kind, kind)
    print(f"{kind} with rope_theta: logits differ by {found:.2g}")
    assert found < 1e-4
PYTHON
"$folder/env/bin/python" -W ignore look.py
echo "as found"
