#!/usr/bin/env bash
# bitsandbytes 0.50.2 with torch 2.13.0 on a CPU: dequantize_4bit gives wrong weights when the rows of a matrix are no
# multiple of the block size, even from codes and scales that quantize_4bit has just made. The error is three times that of
# the definition (value of the code times the scale of its 64 weights). With rows of whole blocks the call is right.
# Why it matters here: files in NF4 and FP4 are read by the definition, so a layer with such rows differs from the library's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2
cd "$folder"
"$folder/env/bin/python" -W ignore - <<'PYTHON' 2>&1 | grep -v "^Failed to load CPU"
import torch
from bitsandbytes import functional

def errors(rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 10
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], -1).flatten()
    scales = state.absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    defined = (state.code[codes.int()] * scales).reshape(rows, columns)
    decoded = functional.dequantize_4bit(packed, state)
    return [float((made - weight).square().mean().sqrt()) for made in (decoded, defined)]

for shape in ((48, 128), (48, 160), (50, 96)):
    print(shape, "root mean square error: library %.4f, definition %.4f" % tuple(errors(*shape)))
library, defined = errors(48, 128)
assert library == defined
for shape in ((48, 160), (50, 96)):
    library, defined = errors(*shape)
    assert library > 2 * defined
print("as found")
PYTHON
