"""Decoders in numpy of the layers that other programs' files hold, from each format's definition alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from helpers.stored_layers import E4M3, FP4

Tensors = Mapping[str, torch.Tensor]
Weight = NDArray[np.float32]


def columns(words: torch.Tensor, bits: int) -> NDArray[Any]:
    """Codes ``[count, columns]``: the bits of each column's words, lowest first, taken ``bits`` at a time."""
    stored = np.ascontiguousarray(words.numpy().T).astype("<i4").view(np.uint8)
    stream = np.unpackbits(stored, axis=1, bitorder="little")
    whole = stream[:, : stream.shape[1] // bits * bits].reshape(len(stored), -1, bits)
    return (whole * (1 << np.arange(bits))).sum(-1).T


def bytes_of(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.view(torch.uint8).numpy()


def gptq(layer: Tensors, settings: Mapping[str, Any]) -> Weight:
    """Of version 1 or 2."""
    bits, offset = settings["bits"], 1 if settings["checkpoint_format"] == "gptq" else 0
    codes = columns(layer["qweight"], bits).astype(np.float32)
    zeros = columns(layer["qzeros"].T.contiguous(), bits).T.astype(np.float32) + offset
    scales, groups = layer["scales"].float().numpy(), layer["g_idx"].numpy()
    assert layer["scales"].dtype == torch.float16 and layer["g_idx"].dtype == torch.int32
    return np.ascontiguousarray((scales[groups] * (codes - zeros[groups])).T)


def awq(layer: Tensors, settings: Mapping[str, Any]) -> Weight:
    """Of the gemm layout: eight outputs a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits."""

    def table(words: torch.Tensor) -> NDArray[Any]:
        stored = words.numpy().view(np.uint32)
        codes = np.zeros((stored.shape[0], 8 * stored.shape[1]), dtype=np.float32)
        for place, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            codes[:, output::8] = stored >> np.uint32(4 * place) & np.uint32(15)
        return codes

    codes, zeros, scales = table(layer["qweight"]), table(layer["qzeros"]), layer["scales"].float().numpy()
    size = len(codes) if settings["group_size"] == -1 else settings["group_size"]
    each = np.arange(len(codes)) // size
    return np.ascontiguousarray((scales[each] * (codes - zeros[each])).T)


def compressed_tensors(layer: Tensors, settings: Mapping[str, Any]) -> Weight:
    """Of all its layouts that are written here."""
    group = settings["config_groups"]["group_0"]
    args, layout = group["weights"], group["format"]
    if layout == "pack-quantized":
        outputs, inputs = layer["weight_shape"].tolist()
        bits = args["num_bits"]
        codes = columns(layer["weight_packed"].T.contiguous(), bits)[:inputs].T.astype(np.float32) - 2 ** (bits - 1)
        scales = layer["weight_scale"].float().numpy()
        if not args["symmetric"]:
            zeros = columns(layer["weight_zero_point"], bits)[:outputs].astype(np.float32) - 2 ** (bits - 1)
            codes -= np.repeat(zeros, inputs // scales.shape[1], axis=1)
        return codes * np.repeat(scales, inputs // scales.shape[1], axis=1)
    if layout == "int-quantized":
        assert layer["weight"].dtype == torch.int8 and args["strategy"] == "channel"
        return layer["weight"].numpy() * layer["weight_scale"].numpy()
    if layout == "float-quantized":
        values, scales = E4M3[bytes_of(layer["weight"])], layer["weight_scale"].numpy()
        if args["strategy"] == "block":
            rows, columns_ = args["block_structure"]
            scales = np.repeat(np.repeat(scales, rows, 0), columns_, 1)[: values.shape[0], : values.shape[1]]
        return values * scales
    stored = layer["weight_packed"].numpy()
    values = FP4[np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)]
    if layout == "mxfp4-pack-quantized":
        scales = np.ldexp(np.float32(1), layer["weight_scale"].numpy().astype(int) - 127).astype(np.float32)
        return values * np.repeat(scales, 32, axis=1)
    assert layout == "nvfp4-pack-quantized"
    scales = E4M3[bytes_of(layer["weight_scale"])] / layer["weight_global_scale"].numpy()
    return values * np.repeat(scales, 16, axis=1)


def bitsandbytes(layer: Tensors, settings: Mapping[str, Any]) -> Weight:
    """NF4: two codes a byte, the first in the high half."""
    assert settings["load_in_4bit"] and settings["bnb_4bit_quant_type"] == "nf4"
    told = json.loads(layer["weight.quant_state.bitsandbytes__nf4"].numpy().tobytes())
    stored = layer["weight"].numpy()
    assert stored.shape == (np.prod(told["shape"]) // 2, 1)
    values = layer["weight.quant_map"].numpy()[np.concatenate([stored >> 4, stored & 15], axis=1).ravel()]
    return (values * np.repeat(layer["weight.absmax"].numpy(), told["blocksize"])[: len(values)]).reshape(told["shape"])
