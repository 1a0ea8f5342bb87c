#!/usr/bin/env bash
# llmcompressor 0.14.0.1 with transformers 5.17.0 and compressed-tensors 0.19.0: a model saved after QuIPModifier is loaded
# without an error and answers as another network. The file says that the inputs of its layers are multiplied by a matrix
# (transform_config, location input), and its weights are divided by that matrix; the loaded model uses these weights and
# leaves the matrix out. Weights keep 8 bits here: in memory the largest difference of a log-probability from the original is
# 1.05, and 12.54 after loading.
# Why it matters here: weights of such a file alone mean nothing. Files with a transform of inputs or outputs are refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.17.0 \
  compressed-tensors==0.19.0 llmcompressor==0.14.0.1
cd "$folder"
cat > look.py <<'PYTHON'
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.quip import QuIPModifier
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, initializer_range=0.3, **sizes)).save_pretrained("dense")
ids = torch.arange(40)[None]


def answers(model):
    with torch.no_grad():
        return model.eval()(ids).logits.double().log_softmax(-1)


model = AutoModelForCausalLM.from_pretrained("dense")
before = answers(model)
recipe = [
    QuIPModifier(targets=["Linear"], ignore=["lm_head"], transform_type="hadamard", rotations=["v"]),
    QuantizationModifier(
        ignore=["lm_head"], config_groups={"all": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}}
    ),
]
oneshot(model=model, recipe=recipe)
distance = {"in memory": (answers(model) - before).abs().max().item()}
model.save_pretrained("saved", save_compressed=True)
distance["loaded"] = (answers(AutoModelForCausalLM.from_pretrained("saved")) - before).abs().max().item()
print({name: round(value, 2) for name, value in distance.items()})
assert distance["in memory"] < 2 and distance["loaded"] > 8
print("as found")
PYTHON
"$folder/env/bin/python" -W ignore look.py 2> errors.txt || { tail -5 errors.txt; exit 1; }
