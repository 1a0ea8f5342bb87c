#!/usr/bin/env bash
# torch 2.13.0: torch._int_mm of int8 matrices [n, 1] and [1, m] on a CPU can give wrong integers when the second one is a
# transposed view, while [n, k] with k > 1 is exact.
# Why it matters here: integer layers are checked against float products of the same integers; a layer of one input would
# fail, so such products are done without _int_mm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
torch.manual_seed(0)
wrong = {}
for inner in (1, 2, 3, 8):
    left = torch.randint(-128, 128, (5, inner), dtype=torch.int8)
    right = torch.randint(-128, 128, (7, inner), dtype=torch.int8)
    exact = left.int() @ right.int().T
    wrong[inner] = int((torch._int_mm(left, right.T) != exact).sum())
print("wrong integers by inner size:", wrong)
assert wrong[1] > 0 and not any(wrong[inner] for inner in (2, 3, 8))
print("as found")
PYTHON
