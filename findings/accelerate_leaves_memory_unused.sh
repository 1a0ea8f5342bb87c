#!/usr/bin/env bash
# accelerate 1.15.0, infer_auto_device_map (the device_map="auto" of transformers): in the first place it leaves room for the
# largest layer, and once a layer does not fit, that one and all later ones go to the next place, though smaller ones would
# fit. So a Llama of 1.07 GB with 400 MB of memory and a disk has all of its layers on disk, because its embeddings (201 MB)
# would need 402; with 404 MB it has the embeddings in memory, and nothing else.
# Why it matters here: max_memory={cpu: ...} can be set to a third of a model and use none of it, and every weight is then read
# from disk in every pass. docs/scaling.md says which limits are of use.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
from collections import Counter

import torch
from accelerate import infer_auto_device_map
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=49152, hidden_size=1024, intermediate_size=4096, num_hidden_layers=10, num_attention_heads=8
)
with torch.device("meta"):
    network = LlamaForCausalLM(config)
found = {}
for limit in (400, 404, 700):
    places = infer_auto_device_map(network, {"cpu": limit * 10**6}, no_split_module_classes=["LlamaDecoderLayer"])
    lies = Counter()
    for path, place in places.items():
        lies[place] += sum(weight.nbytes for weight in network.get_submodule(path).parameters())
    found[limit] = {place: size // 10**6 for place, size in lies.items()}
    print(f"with {limit} MB of memory, MB in each place: {found[limit]}")
assert found == {400: {"disk": 1073}, 404: {"cpu": 201, "disk": 872}, 700: {"cpu": 469, "disk": 604}}
print("as found")
PYTHON
