#!/usr/bin/env bash
# torch 2.13.0 on a CPU: converting infinity, or any number above 448, to float8_e4m3fn gives 448, its largest number.
# float8_e5m2 keeps infinity, and ml_dtypes 0.6.0 turns infinity to NaN in e4m3fn.
# Seen: inf, 1e6 and 465 become 448; NaN stays NaN.
# Why it matters here: a weight or activation that overflowed becomes an ordinary number as soon as it is stored in FP8,
# so that a check for values that are not finite has to come before the conversion. Two libraries decode the same
# infinite input differently.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 ml-dtypes==0.6.0
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON'
import ml_dtypes
import numpy as np
import torch

values = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e6, 465.0, 448.0])
by_torch = values.to(torch.float8_e4m3fn).float()
by_ml_dtypes = values.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
print("torch    ", by_torch.tolist())
print("ml_dtypes", by_ml_dtypes.tolist())
assert by_torch[[0, 1, 3, 4]].tolist() == [448.0, -448.0, 448.0, 448.0] and by_torch[2].isnan()
assert np.isnan(by_ml_dtypes[:3]).all(), "ml_dtypes saturates infinity, too"
assert values.to(torch.float8_e5m2).float()[0].isinf()
print("as found")
PYTHON
