"""Layers as hqq stores them, made with numpy like those of ``stored_layers.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from helpers.stored_layers import Made

PACKINGS = {8: ("8bit_u8", 8, 1), 6: ("8bit_u8", 8, 1), 4: ("4bit_u8", 4, 2), 3: ("3bit_32", 3, 10)}
PACKINGS |= {2: ("2bit_u8", 2, 4), 1.58: ("2bit_u8", 2, 4), 1: ("1bit_u8", 1, 8)}


def letters(text: str) -> torch.Tensor:
    """A text as hqq writes it beside tensors."""
    return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())


def hqq(
    rng: np.random.Generator,
    out: int,
    inputs: int,
    *,
    bits: float = 4,
    group: int = 16,
    axis: int = 1,
    channel_wise: bool = True,
    as_floats: bool = False,
    together: bool = False,
) -> Made:
    """HQQ: groups lie along the rows (axis 1) or columns (axis 0) of a table, or are one.

    ``as_floats`` declares the bytes of the codes as float16; ``together`` stores zeros and scales in one tensor.
    """
    count, (packing, width, run) = out * inputs, PACKINGS[bits]
    codes = rng.integers(0, min(2**width, round(2**bits)), count)
    columns = inputs if not channel_wise else group if axis == 1 else count // group
    place = np.arange(count)
    row, column = place // columns, place % columns
    groups = count // group if channel_wise else 1
    which = np.zeros(count, dtype=int) if not channel_wise else row if axis == 1 else column
    scales = rng.uniform(0.001, 0.1, groups).astype(np.float32)
    zeros = rng.uniform(0, 2**width, groups).astype(np.float32)
    steps = -(-(row.max() + 1) // run)
    words = np.zeros((steps, columns), dtype=np.int32 if width == 3 else np.uint8)
    for code, r, c in zip(codes, row, column, strict=True):  # the first part of the rows in the highest bits
        words[r % steps, c] |= code << width * (run - 1 - r // steps)
    stored = torch.from_numpy(words)
    shape = [groups, 1] if channel_wise and axis == 1 else [1, groups] if channel_wise else []
    pair = (torch.from_numpy(zeros).reshape(shape), torch.from_numpy(scales).reshape(shape))
    tensors = {
        ".W_q": stored.view(torch.float16) if as_floats else stored,
        ".shape": torch.tensor([out, inputs]),
        ".nbits": torch.tensor(bits, dtype=torch.int32 if bits % 1 == 0 else torch.float32),
        ".group_size": torch.tensor(group, dtype=torch.int32),
        ".axis": torch.tensor(axis, dtype=torch.int32),
        ".packing": letters(packing),
        ".compute_dtype": letters("torch.float16"),
        ".unpack_view_dtype": letters("torch.int32" if width == 3 else "torch.uint8"),
    }
    flags = {".view_as_float": as_floats, ".channel_wise": channel_wise, ".offload_meta": together}
    flags |= dict.fromkeys((".encoded_state_dict", ".stores_quant_config", ".optimize"), True)
    flags |= dict.fromkeys((".quant_scale", ".quant_zero", ".round_zero"), False)
    tensors |= {end: torch.tensor(int(flag), dtype=torch.uint8) for end, flag in flags.items()}
    tensors |= {".zero_scale": torch.stack(pair)} if together else {".zero": pair[0], ".scale": pair[1]}
    weight = (codes.astype(np.float32) - zeros[which]) * scales[which]
    told: dict[str, Any] = {"nbits": bits, "group_size": group, "axis": axis, "channel_wise": channel_wise}
    config = {"weight_quant_params": told, "scale_quant_params": None, "zero_quant_params": None}
    settings = {"quant_method": "hqq", "quant_config": config, "skip_modules": ["lm_head"]}
    return Made(tensors, weight.reshape(out, inputs), settings, bits, group if channel_wise else count)
