"""Packing of codes into words of 32 bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from knowledge_compression.heavy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor


def packed(codes: Tensor, bits: int) -> Tensor:
    """Pack each column of ``[count, columns]`` as one bit stream, int32 ``[ceil(count * bits / 32), columns]``.

    The first code is in the lowest bits of the first word; the last word is filled with zeros.
    """
    run = math.lcm(32, bits) // bits  # number of codes that together fill whole words
    wanted = -(-len(codes) * bits // 32)
    groups = functional.pad(codes.to(torch.int64), (0, 0, 0, -len(codes) % run)).unflatten(0, (-1, run))
    words = torch.zeros(len(groups), run * bits // 32, codes.shape[1], dtype=torch.int64)
    for i in range(run):
        word, shift = divmod(i * bits, 32)
        shifted = groups[:, i] << shift
        words[:, word] |= shifted & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= shifted >> 32
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).flatten(0, 1)[:wanted]
