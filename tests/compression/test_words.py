"""Codes of a few bits in 32-bit words."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.decoders import columns
from knowledge_compression.compression.writing.words import packed


@given(bits=st.sampled_from([2, 3, 4, 8]), count=st.integers(1, 100), wide=st.integers(1, 5), seed=st.integers(0, 99))
def test_packing_is_a_stream_of_bits(bits: int, count: int, wide: int, seed: int) -> None:
    codes = torch.randint(2**bits, (count, wide), generator=torch.Generator().manual_seed(seed))
    words = packed(codes.to(torch.uint8), bits)
    assert words.dtype == torch.int32 and words.shape == (-(-count * bits // 32), wide)
    assert np.array_equal(columns(words, bits)[:count], codes.numpy())


def test_three_bits_lie_as_in_published_checkpoints() -> None:
    """Ten codes in the first word, the eleventh across its end: two bits there, one in the next."""
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[10], codes[21] = 0b101, 0b011
    first, second, third = (int(word) & 0xFFFFFFFF for word in packed(codes, 3)[:, 0])
    assert (first, second, third) == (0b01 << 30, 1 | 1 << 31, 0b01)
