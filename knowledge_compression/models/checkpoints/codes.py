"""Decoding of stored codes and small numbers: bit streams in words, 4-bit floats, powers of two in a byte."""

from __future__ import annotations

import torch
from torch import Tensor

# The values of a 4-bit float with two bits of exponent and one of mantissa (OCP Microscaling Formats, v1.0, 5.3.3).
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes ``[..., count]``, uint8, from words of any integer type, ``[..., words]``.

    The last axis is one stream of bits, the first code in the lowest bits of the first word; a code may lie in two
    words.
    """
    # A copy: a transposed row counts as contiguous, but its last axis of one word cannot be seen as bytes.
    stream = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if 8 % bits == 0:
        steps = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes = stream[..., None] >> steps
        return (codes & ((1 << bits) - 1)).flatten(-2)[..., :count]
    single = ((stream[..., None] >> torch.arange(8, dtype=torch.uint8, device=words.device)) & 1).flatten(-2)
    places = torch.arange(bits, dtype=torch.uint8, device=words.device)
    return (single[..., : count * bits].unflatten(-1, (count, bits)) << places).sum(-1, dtype=torch.uint8)


def fp4(packed: Tensor) -> Tensor:
    """4-bit floats ``[..., 2 * bytes]``, float32, from bytes ``[..., bytes]`` whose low half comes first."""
    table = torch.tensor(FP4, device=packed.device)
    return table[unpacked(packed, 4, 2 * packed.shape[-1]).int()]


def powers_of_two(exponents: Tensor) -> Tensor:
    """``2 ** (e - 127)``, float32, of bytes (E8M0 of the OCP Microscaling Formats, v1.0); 255 is NaN."""
    steps = exponents.view(torch.uint8).int()
    return torch.where(steps == 255, torch.nan, torch.ldexp(torch.ones_like(steps, dtype=torch.float32), steps - 127))


def spread(scales: Tensor, shape: tuple[int, ...], block: tuple[int, ...]) -> Tensor:
    """Scales of blocks, ``[ceil(size / block), ...]`` along each axis, expanded to all weights of each block."""
    for axis, (size, step) in enumerate(zip(shape, block, strict=True)):
        if step > 1:
            scales = scales.repeat_interleave(step, axis).narrow(axis, 0, size)
    return scales
