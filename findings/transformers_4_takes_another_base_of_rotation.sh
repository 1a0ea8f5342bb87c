#!/usr/bin/env bash
# transformers 5.23.0 saves the base of rotary embeddings as rope_parameters.rope_theta alone; transformers 4.57.6 looks for
# rope_theta, does not find it, and takes 10000, without an error or a warning: the same files are another network.
# With rope_theta beside rope_parameters, both read the same network.
# Why it matters here: a saved model is loaded by programs that have transformers 4, so saved models state both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip=("$folder/env/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
cat > look.py <<'PYTHON'
import json
import shutil
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ids = torch.arange(40)[None]
if sys.argv[1] == "save":
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    rotation = {"rope_type": "default", "rope_theta": 100000.0}
    network = LlamaForCausalLM(LlamaConfig(rope_parameters=rotation, initializer_range=0.3, **sizes)).eval()
    network.save_pretrained("saved")
    shutil.copytree("saved", "both")
    settings = json.load(open("both/config.json"))
    json.dump({"rope_theta": 100000.0, **settings}, open("both/config.json", "w"))
    torch.save(network(ids).logits.detach(), "logits.pt")
for place in ("saved", "both"):
    read = AutoModelForCausalLM.from_pretrained(place).eval()
    apart = (read(ids).logits - torch.load("logits.pt")).abs().max().item()
    print(f"transformers {transformers.__version__}, {place}: logits differ by {apart:.2g}")
    assert (apart < 1e-4) is (place == "both" or transformers.__version__.startswith("5"))
PYTHON
"$folder/env/bin/python" -W ignore look.py save
"${pip[@]}" transformers==4.57.6
"$folder/env/bin/python" -W ignore look.py read 2> warnings.txt
! grep -i rope warnings.txt
echo "as found"
