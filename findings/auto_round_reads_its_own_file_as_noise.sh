#!/usr/bin/env bash
# auto-round 0.16.1 with transformers 5.24.0 on a CPU: asymmetric 4 bits, saved in the format that auto-round takes by itself
# (packing_format auto_round:auto_awq), are loaded without an error as random numbers. There is no layer for this packing on a
# CPU without further packages, so other layers take its place; the packed tensors of the file are left over, the weights are
# "newly initialized", and only a table in the log says so. Two loads give two networks, and the first question to one ends
# with a TypeError of the replaced layer. Symmetric 4 bits load as they were.
# Why it matters here: users meet such files, and this program reads their packed tensors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.24.0 \
  auto-round==0.16.1
cd "$folder"
cat > look.py <<'PYTHON'
import glob

import torch
from auto_round import AutoRound
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, "w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
text = [" ".join(f"w{(7 * place + shift) % 64}" for place in range(64)) for shift in range(8)]
how = {"iters": 0, "dataset": text, "nsamples": 8, "seqlen": 32, "group_size": 32, "scheme": "W4A16", "device_map": "cpu"}
ids = torch.arange(40)[None]
found = {}


def asked(network):
    try:
        with torch.no_grad():
            return network(ids).logits.float()
    except TypeError:
        return None


for symmetric in (True, False):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, initializer_range=0.3, **sizes))
    before = asked(model)
    AutoRound(model, tokenizer, sym=symmetric, **how).quantize_and_save(f"saved{symmetric}", format="auto_round")
    (place,) = [name.rpartition("/")[0] for name in glob.glob(f"saved{symmetric}/**/model.safetensors", recursive=True)]
    first, second = (AutoModelForCausalLM.from_pretrained(place, device_map="cpu") for _ in range(2))
    same = all(torch.equal(one, other) for one, other in zip(first.state_dict().values(), second.state_dict().values()))
    after = asked(first)
    near = after is not None and torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1].item() > 0.9
    found["symmetric" if symmetric else "asymmetric"] = {"two loads are equal": same, "like the original": near}
print(found)
assert found["symmetric"] == {"two loads are equal": True, "like the original": True}
assert found["asymmetric"] == {"two loads are equal": False, "like the original": False}
print("as found")
PYTHON
"$folder/env/bin/python" -W ignore look.py 2> errors.txt | tail -2 || { tail -5 errors.txt; exit 1; }
