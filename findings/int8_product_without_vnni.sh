#!/usr/bin/env bash
# torch 2.13.0 on an x86 processor without VNNI instructions, as servers of the Skylake generation and many virtual machines:
# on Intel's processors torch._int_mm gives wrong integers without a message, because oneDNN adds pairs of products in 16
# bits, which overflow: sums of 512 products of random int8 values were off by up to 130,000 and more. With AVX512 it is nevertheless faster than
# float32, so a choice by speed takes it. ONEDNN_MAX_CPU_ISA limits any newer Intel processor to such instructions (seen so on
# one with AMX). On an AMD processor of Zen 3 (AVX2) the integers were right, by loops that take twenty to sixty times as long
# as float32.
# Why it matters here: int8 layers that multiply integers wherever torch can, or wherever it is fast, would compute another
# network on such machines. A product is tried with random and with the largest integers before it is used.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$folder"
if grep -q avx512f /proc/cpuinfo; then isa=AVX512_CORE; else isa=AVX2; fi
ONEDNN_MAX_CPU_ISA=$isa OMP_NUM_THREADS=1 "$folder/env/bin/python" -W ignore - <<'PYTHON'
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


error = int((torch._int_mm(left, right) - left.int() @ right.int()).abs().max())
ratio = seconds(lambda: torch._int_mm(left, right)) / seconds(lambda: left.float() @ right.float())
print(f"largest error {error}; the product of int8 takes {ratio:.1f} times the seconds of float32")
if "GenuineIntel" in open("/proc/cpuinfo").read():
    assert error > 10_000
else:
    assert error == 0 and ratio > 3
print("as found")
PYTHON
