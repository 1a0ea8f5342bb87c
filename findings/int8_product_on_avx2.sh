#!/usr/bin/env bash
# torch 2.13.0 on an x86 processor without AVX512-VNNI (AMD Zen 3, many virtual machines): torch._int_mm gives the right
# integers, but takes twenty to sixty times as long as the product of the same matrices in float32, casts included. oneDNN has
# no kernel for int8 with AVX2 alone and takes its reference loops. ONEDNN_MAX_CPU_ISA=AVX2 shows it on any x86 processor.
# Why it matters here: int8 layers that multiply integers wherever torch can would be slower than the model that they
# compress. They multiply float32 there, split so that the sums are exact.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
import time

import torch

generator = torch.Generator().manual_seed(0)
left, right = (torch.randint(-128, 128, (512, 512), dtype=torch.int8, generator=generator) for _ in range(2))


def seconds(product):
    taken = []
    for _ in range(5):
        start = time.process_time()
        product()
        taken.append(time.process_time() - start)
    return min(taken)


assert torch.equal(torch._int_mm(left, right), left.int() @ right.int())
ratio = seconds(lambda: torch._int_mm(left, right)) / seconds(lambda: left.float() @ right.float())
print(f"the product of int8 takes {ratio:.1f} times the seconds of float32")
assert ratio > 3
print("as found")
PYTHON
