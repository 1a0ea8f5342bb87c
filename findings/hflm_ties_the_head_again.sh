#!/usr/bin/env bash
# lm-eval 0.4.13 with transformers 5.23.0: wrapping a model object in HFLM calls its tie_weights(). If the configuration
# says that embeddings are tied, a final layer that was given its own weight is replaced by the embeddings again.
# Seen: a head of zeros gives logits of zero before HFLM is constructed, and other logits afterwards, without a warning.
# Why it matters here: a compressed head would be evaluated uncompressed, and every figure about it would be that of the
# dense head. The head has to be untied in a way that tie_weights() respects.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 lm-eval==0.4.13 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<s>", pad_token="<unk>")
sizes = dict(vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
network = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True))
network.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 8))
ids = torch.tensor([[2, 3]])
with torch.no_grad():
    before = network(ids).logits.abs().sum().item()
    HFLM(pretrained=network, tokenizer=tokenizer)
    after = network(ids).logits.abs().sum().item()
print(f"logits before {before:.3f}, after {after:.3f}")
assert before == 0 < after, "the head is no longer tied again"
assert network.lm_head.weight is network.model.embed_tokens.weight
print("as found")
PYTHON
