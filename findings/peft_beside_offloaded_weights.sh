#!/usr/bin/env bash
# peft 0.21.2 with accelerate 1.15.0 and transformers 5.23.0: with a model that device_map divides over memory and disk
# alone (a computer without a GPU), prefix tuning fails when it is added, with a bare StopIteration, because it looks for a
# device that is neither "cpu" nor "disk"; LoRA is added, but its backward pass raises, as the gradients belong to tensors
# of the meta device; prompt tuning trains.
# Why it matters here: device_map=auto with recovery=lora or prefix is refused in one line, before either error can occur.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 \
  accelerate==1.15.0 peft==0.21.2
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2, vocab_size=64, pad_token_id=0
)
LlamaForCausalLM(config).save_pretrained("model")


def divided():
    size = sum(p.numel() * 4 for p in LlamaForCausalLM(config).parameters())
    network = LlamaForCausalLM.from_pretrained(
        "model", device_map="auto", max_memory={"cpu": int(0.8 * size)}, offload_folder="offloaded"
    )
    assert set(network.hf_device_map.values()) == {"cpu", "disk"}, network.hf_device_map
    return network.requires_grad_(False)


def fate(adapter):
    ids = torch.arange(1, 9)[None]
    try:
        get_peft_model(divided(), adapter)(input_ids=ids, labels=ids).loss.backward()
    except Exception as error:
        return type(error).__name__
    return "trains"


kind = {"task_type": TaskType.CAUSAL_LM}
found = {
    "prompt": fate(PromptTuningConfig(num_virtual_tokens=2, **kind)),
    "prefix": fate(PrefixTuningConfig(num_virtual_tokens=2, **kind)),
    "lora": fate(LoraConfig(r=2, target_modules=["down_proj"], **kind)),
}
print(found)
assert found == {"prompt": "trains", "prefix": "StopIteration", "lora": "RuntimeError"}, "it has changed"
print("as found")
PYTHON
