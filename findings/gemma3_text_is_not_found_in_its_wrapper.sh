#!/usr/bin/env bash
# transformers 5.23.0: a saved Gemma 3 with its vision part, loaded as Gemma3ForCausalLM with the text configuration
# that the wrapper's own get_text_config() gives, finds none of its weights.
# Seen: from_pretrained returns a network of random weights, in which no text weight equals the saved one. It does not
# raise; the load report and output_loading_info list all weights as missing.
# Why it matters here: Gemma 3 4B and larger are published only with their vision part. A program that asks for the text
# model has to load the wrapper and take its language model, or look at the report.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import AutoConfig, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, logging

logging.set_verbosity_error()
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
text = dict(vocab_size=32, num_key_value_heads=2, head_dim=8, **sizes)
wrapper = Gemma3ForConditionalGeneration(
    Gemma3Config(text_config=text, vision_config=dict(image_size=28, patch_size=14, **sizes), mm_tokens_per_image=1)
)
wrapper.save_pretrained("model")
config = AutoConfig.from_pretrained("model").get_text_config()
network, report = Gemma3ForCausalLM.from_pretrained("model", config=config, output_loading_info=True)
missing = report["missing_keys"]
print(f"{len(missing)} of {len(network.state_dict())} weights are missing")
assert len(missing) >= len(list(network.parameters())), "the text model finds its weights in the wrapper now"
saved = wrapper.model.language_model.layers[0].mlp.up_proj.weight
assert not torch.equal(network.model.layers[0].mlp.up_proj.weight, saved)
print("as found")
PYTHON
