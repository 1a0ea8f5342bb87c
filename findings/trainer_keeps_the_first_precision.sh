#!/usr/bin/env bash
# transformers 5.23.0 with accelerate 1.15.0 and torch 2.13.0: a network that one Trainer has trained keeps that Trainer's
# precision under every later one.
# Seen: after bf16=False, bf16=True multiplies in float32; after bf16=True, bf16=False multiplies in bfloat16. No warning.
# Expected: each Trainer trains in the precision that it was given.
# Why it matters here: a comparison of both precisions on one network compares one with itself, and ours did at first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

SHAPE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 2


def multiplied_in(*choices):
    """The dtype of a layer's output under Trainers one after the other, on one network."""
    seen = []
    network = LlamaForCausalLM(LlamaConfig(**SHAPE))
    network.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    for bf16 in choices:
        arguments = TrainingArguments(
            output_dir="out", max_steps=1, bf16=bf16, use_cpu=True, disable_tqdm=True, save_strategy="no"
        )
        Trainer(model=network, args=arguments, train_dataset=ROWS).train()
    return seen


alone = [*multiplied_in(False), *multiplied_in(True)]
after_float32, after_bfloat16 = multiplied_in(False, True), multiplied_in(True, False)
print("alone", alone, "bf16=True after False", after_float32, "bf16=False after True", after_bfloat16)
assert alone == [torch.float32, torch.bfloat16]
assert after_float32 == [torch.float32] * 2
assert after_bfloat16 == [torch.bfloat16] * 2
print("as found")
PYTHON
