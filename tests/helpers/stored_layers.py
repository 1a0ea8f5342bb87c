"""Layers as compressed files store them, made with numpy from random codes, beside the weights that they stand for.

Nothing here is shared with the product: a stream of bits is numpy's ``packbits``, 4-bit floats are spelled from
their bits, and every weight is computed from its definition.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Made:
    """One stored layer.

    Attributes:
        tensors: by the endings of their names.
        weight: what they stand for, ``[out, in]``, or as the network's parameter is.
        settings: the ``quantization_config`` of a checkpoint of such layers.
        bits: of a code.
        group: how many weights share one scale.
    """

    tensors: Mapping[str, torch.Tensor]
    weight: Floats
    settings: Mapping[str, Any]
    bits: float
    group: int
    kind: str = ""
    notes: list[str] = field(default_factory=list)


def stream(codes: NDArray[Any], bits: int) -> torch.Tensor:
    """Rows of codes as rows of int32 words: one stream of bits each, filled up with zeros."""
    rows = np.asarray(codes, dtype=np.uint8)
    single = (rows[..., None] >> np.arange(bits)) & 1
    flat = single.reshape(len(rows), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return torch.from_numpy(np.packbits(flat.astype(np.uint8), axis=1, bitorder="little").view(np.int32).copy())


def fp4_value(code: int) -> float:
    """Sign, two bits of exponent, one of mantissa."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if code & 8 else size


def e4m3_value(code: int) -> float:
    """Sign, four bits of exponent less 7, three of mantissa; all ones are no number."""
    exponent, mantissa = code >> 3 & 15, code & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return float("nan") if code & 127 == 127 else -size if code & 128 else size


E4M3 = np.array([e4m3_value(code) for code in range(256)], dtype=np.float32)


def float8(codes: NDArray[Any]) -> torch.Tensor:
    """Bytes as the numbers that torch reads in them."""
    return torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn)


def finite_codes(rng: np.random.Generator, *shape: int) -> NDArray[Any]:
    """Bytes of E4M3 that are numbers."""
    codes = rng.integers(0, 256, shape)
    return np.where(codes & 127 == 127, 0, codes)


FP4 = np.array([fp4_value(code) for code in range(16)], dtype=np.float32)


def halves(codes: NDArray[Any], low_first: bool = True) -> torch.Tensor:
    """Rows of 4-bit codes, two a byte."""
    pairs = np.asarray(codes, dtype=np.uint8).reshape(*codes.shape[:-1], -1, 2)
    low, high = (pairs[..., 0], pairs[..., 1]) if low_first else (pairs[..., 1], pairs[..., 0])
    return torch.from_numpy(low | high << 4)


def gptq(
    rng: np.random.Generator,
    out: int,
    inputs: int,
    *,
    bits: int = 4,
    group: int = 32,
    version: int = 1,
    act_order: bool = False,
    with_groups: bool = True,
) -> Made:
    """GPTQ, version 1 or 2."""
    groups = -(-inputs // group)
    places = np.arange(inputs) // group
    if act_order:
        rng.shuffle(places)
    codes = rng.integers(0, 2**bits, (out, inputs))
    zeros = rng.integers(0, 2**bits, (out, groups))
    scales = rng.uniform(0.001, 0.1, (out, groups)).astype(np.float16)
    stored_zeros = (zeros - 1) % 2**bits if version == 1 else zeros
    weight = scales.astype(np.float64)[:, places] * (codes - zeros[:, places])
    tensors = {
        ".qweight": stream(codes, bits).T.contiguous(),
        ".qzeros": stream(stored_zeros.T, bits),
        ".scales": torch.from_numpy(scales.T.copy()),
    }
    if with_groups:
        tensors[".g_idx"] = torch.from_numpy(places.astype(np.int32))
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": False}
    settings |= {"checkpoint_format": "gptq" if version == 1 else "gptq_v2", "meta": {"quantizer": ["numpy:1"]}}
    return Made(tensors, weight.astype(np.float32), settings, bits, group)


def awq(rng: np.random.Generator, out: int, inputs: int, *, group: int = 32) -> Made:
    """AWQ, gemm: of eight neighbouring outputs, a word holds numbers 0, 2, 4, 6, 1, 3, 5, 7, lowest first."""
    groups = inputs // group
    codes, zeros = rng.integers(0, 16, (inputs, out)), rng.integers(0, 16, (groups, out))
    scales = rng.uniform(0.001, 0.1, (groups, out)).astype(np.float16)

    def words(table: NDArray[Any]) -> torch.Tensor:
        packed = np.zeros((len(table), out // 8), dtype=np.uint32)
        for word in range(out // 8):
            for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                packed[:, word] |= table[:, 8 * word + column].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(packed.view(np.int32))

    each = np.repeat(np.arange(groups), group)
    weight = scales.astype(np.float64)[each] * (codes - zeros[each])
    tensors = {".qweight": words(codes), ".qzeros": words(zeros), ".scales": torch.from_numpy(scales)}
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Made(tensors, weight.T.astype(np.float32), settings, 4, group)


def packed(
    rng: np.random.Generator,
    out: int,
    inputs: int,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    order: bool = False,
    whole: bool = False,
    scale_type: torch.dtype = torch.bfloat16,
) -> Made:
    """compressed-tensors, pack-quantized; ``whole`` packs only whole codes into a word, as early versions did."""
    groups, half = inputs // group, 2 ** (bits - 1)
    places = np.arange(inputs) // group
    if order:
        rng.shuffle(places)
    codes = rng.integers(-half, half, (out, inputs))
    zeros = np.zeros((out, groups), dtype=int) if symmetric else rng.integers(-half, half, (out, groups))
    scales = torch.from_numpy(rng.uniform(0.001, 0.1, (out, groups))).to(scale_type)
    weight = scales.double().numpy()[:, places] * (codes - zeros[:, places])
    rows = codes + half
    if whole:
        run = 32 // bits
        filled = np.pad(rows, ((0, 0), (0, -inputs % run))).reshape(-1, run)
        words = stream(filled, bits).reshape(out, -1)
    else:
        words = stream(rows, bits)
    tensors = {".weight_packed": words, ".weight_scale": scales, ".weight_shape": torch.tensor([out, inputs])}
    if not symmetric:
        tensors[".weight_zero_point"] = stream((zeros + half).T, bits).T.contiguous()
    if order:
        tensors[".weight_g_idx"] = torch.from_numpy(places.astype(np.int32))
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    return Made(tensors, weight.astype(np.float32), _groups("pack-quantized", weights), bits, group)


def plain(
    rng: np.random.Generator, out: int, inputs: int, *, kind: str = "int", strategy: str = "channel", zero: bool = False
) -> Made:
    """compressed-tensors, int-quantized and float-quantized: by tensor, by output, by group or by block."""
    shape = {
        "tensor": (1,),
        "channel": (out, 1),
        "group": (out, inputs // 16),
        "block": (-(-out // 24), -(-inputs // 40)),
    }
    cells = shape[strategy]
    scales = rng.uniform(0.001, 0.1, cells).astype(np.float32)
    if kind == "int":
        codes: NDArray[Any] = rng.integers(-128, 128, (out, inputs)).astype(np.int8)
        stored = torch.from_numpy(codes)
    else:
        codes = finite_codes(rng, out, inputs)
        stored, codes = float8(codes), E4M3[codes]
    rows, columns = {"tensor": (out, inputs), "channel": (1, inputs), "group": (1, 16), "block": (24, 40)}[strategy]
    grid = np.broadcast_to(scales.reshape(1, 1), (1, 1)) if strategy == "tensor" else scales
    each = np.repeat(np.repeat(grid, rows, 0), columns, 1)[:out, :inputs]
    tensors = {".weight": stored, ".weight_scale": torch.from_numpy(scales)}
    values = codes.astype(np.float32)
    if zero:
        zeros = rng.integers(-20, 20, cells).astype(np.int8)
        tensors[".weight_zero_point"] = torch.from_numpy(zeros)
        values = values - np.repeat(np.repeat(zeros.astype(np.float32), rows, 0), columns, 1)[:out, :inputs]
    weights: dict[str, Any] = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": not zero}
    if strategy == "block":
        weights["block_structure"] = [24, 40]
    settings = _groups(f"{kind}-quantized", weights, activations={"num_bits": 8, "type": kind})
    return Made(tensors, values * each, settings, 8, rows * columns)


def nvfp4(rng: np.random.Generator, out: int, inputs: int) -> Made:
    """compressed-tensors, nvfp4-pack-quantized."""
    codes = rng.integers(0, 16, (out, inputs))
    scales = rng.integers(8, 126, (out, inputs // 16))  # bytes of positive numbers
    whole = np.float32(rng.uniform(100, 3000))
    each = np.repeat(E4M3[scales] / whole, 16, 1)
    tensors = {
        ".weight_packed": halves(codes),
        ".weight_scale": float8(scales),
        ".weight_global_scale": torch.tensor([whole]),
    }
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    return Made(tensors, FP4[codes] * each, _groups("nvfp4-pack-quantized", weights), 4, 16)


def mxfp4_packed(rng: np.random.Generator, out: int, inputs: int) -> Made:
    """compressed-tensors, mxfp4-pack-quantized."""
    codes, steps = rng.integers(0, 16, (out, inputs)), rng.integers(110, 140, (out, inputs // 32))
    each = np.repeat(np.ldexp(np.float32(1), steps - 127), 32, 1).astype(np.float32)
    tensors = {".weight_packed": halves(codes), ".weight_scale": torch.from_numpy(steps.astype(np.uint8))}
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    return Made(tensors, FP4[codes] * each, _groups("mxfp4-pack-quantized", weights), 4, 32)


def mxfp8(rng: np.random.Generator, out: int, inputs: int, *, run: int = 16) -> Made:
    """compressed-tensors, mxfp8-quantized (whose groups are of 32)."""
    codes, steps = finite_codes(rng, out, inputs), rng.integers(110, 140, (out, inputs // run))
    each = np.repeat(np.ldexp(np.float32(1), steps - 127), run, 1).astype(np.float32)
    tensors = {".weight": float8(codes), ".weight_scale": torch.from_numpy(steps.astype(np.uint8))}
    weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": run, "symmetric": True}
    return Made(tensors, E4M3[codes] * each, _groups("mxfp8-quantized", weights), 8, run)


def mlx(rng: np.random.Generator, out: int, inputs: int, *, mode: str = "affine", bits: int = 4) -> Made:
    """mlx-lm, as the layers of a LLaMA."""
    run = 16 if mode == "nvfp4" else 32
    settings = {"quant_method": "mlx", "model_type": "llama", "group_size": run, "bits": bits, "mode": mode}
    each = (out, inputs // run)
    if mode == "affine":
        codes = rng.integers(0, 2**bits, (out, inputs))
        scales, biases = (rng.uniform(-0.1, 0.1, each).astype(np.float16) for _ in range(2))
        words = stream(codes, bits)
        tensors = {".scales": torch.from_numpy(scales), ".biases": torch.from_numpy(biases)}
        wide = [np.repeat(one.astype(np.float32), run, 1) for one in (scales, biases)]
        weight = codes.astype(np.float32) * wide[0] + wide[1]
    else:
        codes = finite_codes(rng, out, inputs) if bits == 8 else rng.integers(0, 16, (out, inputs))
        words = stream(codes, bits)
        scales = rng.integers(1, 120, each) if mode == "nvfp4" else rng.integers(110, 140, each)
        tensors = {".scales": torch.from_numpy(scales.astype(np.uint8))}
        factor = E4M3[scales] if mode == "nvfp4" else np.ldexp(np.float32(1), scales - 127)
        weight = (E4M3 if bits == 8 else FP4)[codes] * np.repeat(factor.astype(np.float32), run, 1)
    return Made({".weight": words.view(torch.uint32), **tensors}, weight, settings, bits, run)


def modelopt(rng: np.random.Generator, out: int, inputs: int, *, algorithm: str = "NVFP4") -> Made:
    """NVIDIA's Model Optimizer; SmoothQuant and AWQ with a factor for each input."""
    settings = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    steps, run, bits = rng.integers(110, 140, (out, inputs // 16)).astype(np.uint8), 16, 4
    tensors: dict[str, torch.Tensor] = {}
    if algorithm.startswith(("FP8", "W8A8")):
        blocks = {"FP8": (), "FP8_PB_WO": (out, 1, inputs // 16, 1)}.get(algorithm, (out,))
        scales = rng.uniform(0.001, 0.1, blocks).astype(np.float32)
        wide = np.reshape(scales, (out if blocks else 1, inputs // 16 if len(blocks) > 1 else 1))
        factor = np.repeat(np.broadcast_to(wide, (out, inputs // 16)), 16, 1)
        codes = rng.integers(-127, 128, (out, inputs)) if "W8A8" in algorithm else finite_codes(rng, out, inputs)
        tensors[".weight"] = torch.from_numpy(codes.astype(np.int8)) if "W8A8" in algorithm else float8(codes)
        tensors[".weight_scale"] = torch.from_numpy(np.asarray(scales))
        weight = (codes if "W8A8" in algorithm else E4M3[codes]) * factor
        run, bits = {"FP8": out * inputs, "FP8_PB_WO": 16}.get(algorithm, inputs), 8
    elif algorithm in ("MXFP8", "MXFP4"):
        bits = int(algorithm[-1])
        codes = finite_codes(rng, out, inputs) if bits == 8 else rng.integers(0, 16, (out, inputs))
        tensors = {".weight": float8(codes) if bits == 8 else halves(codes), ".weight_scale": torch.from_numpy(steps)}
        factor = np.repeat(np.ldexp(np.float32(1), steps.astype(int) - 127), 16, 1).astype(np.float32)
        weight = (E4M3 if bits == 8 else FP4)[codes] * factor
    elif algorithm == "NVFP4":
        codes, scales = rng.integers(0, 16, (out, inputs)), rng.integers(1, 120, (out, inputs // 16))
        whole = np.float32(0.013)
        tensors = {".weight": halves(codes), ".weight_scale": float8(scales), ".weight_scale_2": torch.tensor(whole)}
        weight = FP4[codes] * np.repeat(E4M3[scales] * whole, 16, 1)
    else:  # two outputs a byte
        codes, scales = rng.integers(-8, 8, (out, inputs)), rng.uniform(0.001, 0.1, (out, inputs // 16))
        low, high = codes[0::2] & 15, codes[1::2] & 15
        tensors[".weight"] = torch.from_numpy((low | high << 4).astype(np.uint8))
        tensors[".weight_scale"] = torch.from_numpy(scales.astype(np.float32))
        weight = codes * np.repeat(scales.astype(np.float32), 16, 1)
    if algorithm.endswith(("SQ_PER_CHANNEL", "AWQ")):
        before = rng.uniform(0.5, 2, inputs).astype(np.float32)
        tensors[".pre_quant_scale"] = torch.from_numpy(before)
        weight = weight.astype(np.float32) * before
    return Made(tensors, weight.astype(np.float32), settings, bits, run)


def four_bit(
    rng: np.random.Generator,
    out: int,
    inputs: int,
    *,
    kind: str = "nf4",
    run: int = 64,
    nested: bool = False,
    storage: torch.dtype = torch.uint8,
) -> Made:
    """bitsandbytes: NF4 or FP4, the scales quantized too where ``nested``; bytes declared as the type ``storage``."""
    count = out * inputs
    codes, values = rng.integers(0, 16, count), np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    runs = -(-count // run)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": run, "dtype": "bfloat16", "shape": [out, inputs]}
    tensors = {
        ".weight": halves(np.pad(codes, (0, count % 2))[None], low_first=False).flatten().view(storage)[:, None],
        ".weight.quant_map": torch.from_numpy(values),
    }
    if nested:
        table = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        places, blocks = rng.integers(0, 256, runs), rng.uniform(0.1, 1, -(-runs // 256)).astype(np.float32)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        tensors[".weight.absmax"] = torch.from_numpy(places.astype(np.uint8))
        tensors[".weight.nested_absmax"] = torch.from_numpy(blocks)
        tensors[".weight.nested_quant_map"] = torch.from_numpy(table)
        scales = table[places] * np.repeat(blocks, 256)[:runs] + np.float32(0.25)
    else:
        scales = rng.uniform(0.01, 1, runs).astype(np.float32)
        tensors[".weight.absmax"] = torch.from_numpy(scales)
    told = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8).copy()
    tensors[f".weight.quant_state.bitsandbytes__{kind}"] = torch.from_numpy(told)
    weight = values[codes] * np.repeat(scales, run)[:count]
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return Made(tensors, weight.reshape(out, inputs), settings, 4, run, kind.upper())


def eight_bit(rng: np.random.Generator, out: int, inputs: int) -> Made:
    """bitsandbytes: LLM.int8()."""
    codes, scales = rng.integers(-127, 128, (out, inputs)).astype(np.int8), rng.uniform(0.1, 4, out).astype(np.float32)
    tensors = {".weight": torch.from_numpy(codes), ".SCB": torch.from_numpy(scales)}
    tensors[".weight_format"] = torch.tensor(0, dtype=torch.uint8)
    weight = (codes.astype(np.float32) * scales[:, None]) * np.float32(1 / 127)
    return Made(tensors, weight, {"quant_method": "bitsandbytes", "load_in_8bit": True}, 8, inputs)


def block_fp8(rng: np.random.Generator, out: int, inputs: int, *, block: tuple[int, int] = (24, 40)) -> Made:
    """Block FP8 with blocks that need not divide the layer."""
    codes = finite_codes(rng, out, inputs)
    scales = rng.uniform(0.001, 0.1, (-(-out // block[0]), -(-inputs // block[1]))).astype(np.float32)
    each = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[:out, :inputs]
    tensors = {
        ".weight": float8(codes),
        ".weight_scale_inv": torch.from_numpy(scales),
    }
    settings = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic"}
    return Made(tensors, E4M3[codes] * each, settings, 8, block[0] * block[1])


def torchao(rng: np.random.Generator, out: int, inputs: int, *, kind: str = "int8", group: int = 0) -> Made:
    """torchao: 8 bits with one scale for ``group`` inputs (0: a row, -1: the whole layer), or 4 bits, plain."""
    group = group or inputs
    blocks = (1, 1) if group < 0 else (out, inputs // group)
    run = out * inputs if group < 0 else group
    scales = rng.uniform(0.001, 0.1, blocks).astype(np.float32)
    zeros = rng.integers(-5, 6, blocks).astype(np.int8)
    each = (np.arange(out)[:, None] * (0 if group < 0 else 1), np.arange(inputs)[None] * (0 if group < 0 else 1) // run)
    settings: dict[str, Any] = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}
    tensors = {"._weight_scale": torch.from_numpy(scales)}
    if kind == "float8":
        codes = finite_codes(rng, out, inputs)
        tensors["._weight_qdata"] = float8(codes)
        weight = E4M3[codes] * scales[each]
    elif kind == "int8":
        codes = rng.integers(-128, 128, (out, inputs)).astype(np.int8)
        tensors |= {"._weight_qdata": torch.from_numpy(codes), "._weight_zero_point": torch.from_numpy(zeros)}
        weight = (codes.astype(np.float32) - zeros[each]) * scales[each]
    else:
        codes = rng.integers(-8, 8, (out, inputs))
        shifts = rng.normal(0, 0.1, blocks).astype(np.float32)
        tensors["._weight_qdata"] = halves(codes & 15)
        tensors["._weight_scale"] = torch.from_numpy(np.ascontiguousarray(scales.T))
        tensors["._weight_zero_point"] = torch.from_numpy(np.ascontiguousarray(shifts.T))
        weight = codes.astype(np.float32) * scales[each] + shifts[each]
    made = {"quant_method": "torchao", "quant_type": {"default": settings}}
    return Made(tensors, weight.astype(np.float32), made, 4 if kind == "int4" else 8, run)


def experts(rng: np.random.Generator, count: int, out: int, inputs: int) -> Made:
    """MXFP4 of gpt-oss: a bank of experts."""
    codes = rng.integers(0, 16, (count, out, inputs // 32, 32))
    steps = rng.integers(110, 140, (count, out, inputs // 32))
    values = FP4[codes] * np.ldexp(np.float32(1), steps - 127)[..., None]
    tensors = {"_blocks": halves(codes), "_scales": torch.from_numpy(steps.astype(np.uint8))}
    weight = values.reshape(count, out, inputs).transpose(0, 2, 1).astype(np.float32)
    return Made(tensors, np.ascontiguousarray(weight), {"quant_method": "mxfp4"}, 4, 32)


def _groups(layout: str, weights: dict[str, Any], activations: Any = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": layout}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "version": "0.20",
    }


def sparse(rng: np.random.Generator, out: int, inputs: int, *, two_of_four: bool = True, fp8: bool = False) -> Made:
    """compressed-tensors 0.9 to 0.12: values that are not zero, row by row, and a bit for each place, lowest first."""
    there = np.zeros((out, inputs), dtype=bool)
    if two_of_four:
        for row, start in itertools.product(range(out), range(0, inputs, 4)):
            there[row, start + rng.permutation(4)[:2]] = True
    else:
        there |= rng.random((out, inputs)) < 0.3
    layout = "sparse-24-bitmask" if two_of_four else "sparse-bitmask"
    settings: dict[str, Any] = {"quant_method": "compressed-tensors", "config_groups": {}, "version": "0.9"}
    settings["sparsity_config"] = {"format": layout, "targets": ["Linear"], "ignore": ["lm_head"]}
    bits = np.zeros((out, -(-inputs // 8)), dtype=np.uint8)
    for row, column in zip(*there.nonzero(), strict=True):
        bits[row, column // 8] |= 1 << column % 8
    tensors = {".bitmask": torch.from_numpy(bits), ".shape": torch.tensor([out, inputs])}
    weight = np.zeros((out, inputs), dtype=np.float32)
    if fp8:
        codes = finite_codes(rng, int(there.sum()))
        scale = rng.uniform(0.001, 0.1, (out, 1)).astype(np.float32)
        weight[there] = E4M3[codes]
        weight *= scale
        values = float8(codes)
        tensors[".weight_scale"] = torch.from_numpy(scale)
        group = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}, "targets": ["Linear"]}
        settings["config_groups"] = {"group_0": group}
    else:
        values = torch.from_numpy(rng.normal(size=int(there.sum())).astype(np.float16))
        weight[there] = values.float().numpy()
    if two_of_four:
        tensors[".shape"], values = tensors[".shape"][:, None], values.view(out, inputs // 2)
    else:
        tensors[".row_offsets"] = torch.from_numpy(there.sum(1).cumsum() - there.sum(1))
    return Made(tensors | {".compressed": values}, weight, settings, 8 if fp8 else 16, None)
