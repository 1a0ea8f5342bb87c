#!/usr/bin/env bash
# torchao 0.18.0 with torch 2.13.0 on a CPU: Float8WeightOnlyConfig makes NaN of every weight of an output whose weights are all
# zero. Its scale, the largest magnitude over 448, is then zero, and the weights are divided by it.
# Why it matters here: pruned models have such rows. compressed-tensors gives them a small scale instead, and so does the
# method fp8 here.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchao==0.18.0
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON' 2>&1 | grep -v "^Failed to load"
import torch
from torchao.quantization import Float8WeightOnlyConfig, quantize_

layer = torch.nn.Linear(64, 64, bias=False).bfloat16()
layer.weight.data[3] = 0
layers = torch.nn.Sequential(layer)
quantize_(layers, Float8WeightOnlyConfig())
outputs = layers(torch.randn(2, 64).bfloat16())
print("outputs that are no numbers:", outputs.isnan().nonzero().tolist())
assert outputs.isnan().nonzero().tolist() == [[0, 3], [1, 3]]
print("as found")
PYTHON
