#!/usr/bin/env bash
# torch 2.13.0 with oneDNN 3.12 on an Intel processor with AMX: torch.ops.onednn.qlinear_pointwise, with a weight that was made
# by to_mkldnn and so is not packed, gives wrong values in the last columns if both sides of the weight leave a remainder, for
# example 33 outputs and a number of inputs above 64 that 64 does not divide. For which sizes, and how wrong, differs from process
# to process: with 33 outputs, 6 to 12 of 50 numbers of inputs between 65 and 130 gave wrong values, by up to tens of thousands,
# where sums of integers are exact. A packed weight (qlinear_prepack), a remainder on one side only, and
# ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI give the right integers.
# Why it matters here: this product scales its sums before it stores them, which makes int8 layers faster. They take it only
# where 64 divides the number of inputs. It needs a processor with AMX to be seen.
set -euo pipefail
grep -q amx_int8 /proc/cpuinfo || { echo "this processor has no AMX, so nothing can be said"; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
cat > shown.py <<'PYTHON'
import sys

import torch

generator = torch.Generator().manual_seed(0)


def wrong_columns(inputs, outputs, packed):
    left = torch.randint(-127, 128, (40, inputs), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    theirs = torch.ops.onednn.qlinear_prepack(weight, [40, inputs]) if packed else weight.to_mkldnn().transpose(0, 1)
    zeros = torch.zeros(outputs, dtype=torch.int32)
    found = torch.ops.onednn.qlinear_pointwise(
        left, 1.0, 0, theirs, torch.ones(outputs), zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    away = (found.double() - left.double() @ weight.double().T).abs().amax(0)
    return [(int(column), int(away[column])) for column in away.nonzero()[:, 0]]


remainders = [inputs for inputs in range(65, 131) if inputs % 4]
wrong = {inputs: found for inputs in remainders if (found := wrong_columns(inputs, 33, packed=False))}
print(f"wrong with 33 outputs and {len(wrong)} of {len(remainders)} numbers of inputs: {dict(list(wrong.items())[:3])}")
assert bool(wrong) == (sys.argv[1] == "amx")
for inputs in remainders:
    assert not wrong_columns(inputs, 32, packed=False) and not wrong_columns(inputs, 33, packed=True)
assert not wrong_columns(64, 33, packed=False) and not wrong_columns(576, 577, packed=False)
PYTHON
"$folder/env/bin/python" -W ignore shown.py amx
ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI "$folder/env/bin/python" -W ignore shown.py none
echo "as found"
