#!/usr/bin/env bash
# torch 2.13.0: under autocast on a CPU, `a @ b` of two float32 matrices is bfloat16, and the in-place `c.addmm_(a, b)`
# of the same matrices raises instead of being narrowed or left alone.
# Seen: "self and mat2 must have the same dtype".
# Why it matters here: a solver (GPTQ, SparseGPT) inside an autocast context either stops, or else
# computes in 8 bits of mantissa what its authors call float32. The context belongs around forward passes only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import torch
a, b, c = torch.randn(4, 4), torch.randn(4, 4), torch.zeros(4, 4)
with torch.autocast("cpu", torch.bfloat16):
    assert (a @ b).dtype == torch.bfloat16
    try:
        c.addmm_(a, a @ b)
    except RuntimeError as error:
        print(error)
        assert "must have the same dtype" in str(error)
    else:
        raise SystemExit("addmm_ no longer refuses")
print("as found")
PYTHON
