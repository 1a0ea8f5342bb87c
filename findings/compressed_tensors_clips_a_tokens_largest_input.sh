#!/usr/bin/env bash
# compressed-tensors 0.20.1 with torch 2.13.0: where a layer's inputs are rounded to 8 bits at run time, a step is a token's largest
# magnitude over 127.5, so the largest input, if it is positive, is clipped to 127 steps and never comes back as it was. SmoothQuant's
# definition, and vLLM's kernels for the same files, divide by 127.
# Why it matters here: the same file gives other answers in transformers than in a run with SmoothQuant's steps, and the
# difference is as large as the effect of rounding inputs itself; compression.input_steps=127.5 rounds as the library does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 compressed-tensors==0.20.1
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

settings = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
inputs = torch.tensor([[[127.5, -127.5, 64.0]]])
scale, zero = compute_dynamic_scales_and_zp(inputs, settings, torch.nn.Linear(3, 1))
rounded = fake_quantize(inputs, scale, zero, settings)
print("step", scale.item(), "inputs", inputs.flatten().tolist(), "rounded", rounded.flatten().tolist())
assert scale.item() == 1.0
assert rounded.flatten().tolist() == [127.0, -128.0, 64.0]
print("as found")
PYTHON
