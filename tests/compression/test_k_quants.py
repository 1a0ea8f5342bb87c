"""K quants, block by block, against a reader and a rounding that share nothing with the product."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from hypothesis import given
from hypothesis import strategies as st

from knowledge_compression.compression.solve.k_quants import K_QUANTS, encoded

BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
# Weights a group, the highest integer scale of types with minima, and how far codes reach.
PLAIN = {"Q2_K": (16, 15, 3), "Q4_K": (32, 63, 15), "Q5_K": (32, 63, 31)}
SIGNED = {"Q3_K": (16, -32, 31, -4, 3), "Q6_K": (16, -128, 127, -32, 31)}


def half(data: bytes) -> np.float32:
    return np.float32(struct.unpack("<e", data)[0])


def six_bits(data: bytes, i: int) -> tuple[int, int]:
    """Scale and minimum of a group, from the twelve bytes of Q4_K and Q5_K."""
    if i < 4:
        return data[i] & 63, data[i + 4] & 63
    return (data[i + 4] & 15) | (data[i - 4] >> 6 << 4), (data[i + 4] >> 4) | (data[i] >> 6 << 4)


def read(kind: str, block: bytes) -> Iterator[np.float32]:
    """The 256 weights of a super-block, one at a time, from ggml's definition."""
    for i in range(256):
        run, lane = i // 128, i % 32  # two halves of 128, of which each has four runs of 32
        shift = i // 32 % 4
        if kind == "Q2_K":
            scale = block[i // 16]
            code = block[16 + 32 * run + lane] >> 2 * shift & 3
            d, d_min = half(block[80:82]), half(block[82:84])
            yield d * np.float32(scale & 15) * np.float32(code) - d_min * np.float32(scale >> 4)
        elif kind == "Q3_K":
            group, scales = i // 16, block[96:108]
            low = scales[group % 8] >> (4 * (group // 8)) & 15
            scale = (low | (scales[8 + group % 4] >> (2 * (group // 4)) & 3) << 4) - 32
            third = block[lane] >> i // 32 & 1
            code = (block[32 + 32 * run + lane] >> 2 * shift & 3) - (0 if third else 4)
            yield half(block[108:110]) * np.float32(scale) * np.float32(code)
        elif kind in ("Q4_K", "Q5_K"):
            scale, minimum = six_bits(block[4:16], i // 32)
            nibbles = 16 if kind == "Q4_K" else 48
            code = block[nibbles + 32 * (i // 64) + lane] >> 4 * (i // 32 % 2) & 15
            if kind == "Q5_K":
                code |= (block[16 + lane] >> i // 32 & 1) << 4
            d, d_min = half(block[0:2]), half(block[2:4])
            yield d * np.float32(scale) * np.float32(code) - d_min * np.float32(minimum)
        else:
            low = block[64 * run + i % 64] >> 4 * (i // 64 % 2) & 15
            high = block[128 + 32 * run + lane] >> 2 * shift & 3
            scale = struct.unpack("b", block[192 + i // 16 : 193 + i // 16])[0]
            yield half(block[208:210]) * np.float32(scale) * np.float32((low | high << 4) - 32)


def weights_like(seed: int, rows: int, blocks: int, size: float) -> torch.Tensor:
    """Rows of many kinds: normal, all zeros, of one sign, with an outlier, constant."""
    generator = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(rows, 256 * blocks, generator=generator)
    changes = [lambda row: row, torch.zeros_like, torch.abs, lambda row: -row.abs(), lambda row: row / row.abs().max()]
    for i, row in enumerate(weight):
        row.copy_(changes[(i + seed) % len(changes)](row))
        if (i + seed) % 7 == 0:
            row[3] = 40 * size
    return weight


@given(
    kind=st.sampled_from(sorted(K_QUANTS)),
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 4),
    blocks=st.integers(1, 2),
    size=st.sampled_from([1e-4, 0.02, 3.0, 500.0]),
)
def test_the_bytes_say_what_gguf_reads_and_round_no_worse_than_plainly(
    kind: str, seed: int, rows: int, blocks: int, size: float
) -> None:
    weight = weights_like(seed, rows, blocks, size)
    data = encoded(weight, K_QUANTS[kind]).numpy()
    assert data.dtype == np.uint8 and data.shape == (rows, blocks * BYTES[kind])
    values = dequantize(data, GGMLQuantizationType[kind])
    last = bytes(data.reshape(-1, BYTES[kind])[-1])
    assert np.array_equal(np.array(list(read(kind, last))), values.reshape(-1, 256)[-1])
    ours = np.square(values - weight.numpy()).reshape(-1, 256).sum(1, dtype=np.float64)
    plain = np.square(plainly(kind, weight.numpy()) - weight.numpy()).reshape(-1, 256).sum(1, dtype=np.float64)
    assert (ours <= plain * (1 + 1e-5) + 1e-12 * size**2).all()


def plainly(kind: str, weight: np.ndarray) -> np.ndarray:
    """Round to nearest, with the scales of the grids that just span each group, rounded to their integers."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind in PLAIN:
            group, top, code = PLAIN[kind]
            blocks = weight.reshape(-1, 256 // group, group)
            low = np.minimum(blocks.min(-1, keepdims=True), 0)
            scale = (blocks.max(-1, keepdims=True) - low) / np.float32(code)
            d, d_min = ((part.max(1, keepdims=True) / np.float32(top)).astype(np.float16) for part in (scale, -low))
            steps = d.astype(np.float32) * np.nan_to_num(np.round(scale / d)).clip(0, top)
            bottom = d_min.astype(np.float32) * np.nan_to_num(np.round(-low / d_min)).clip(0, top)
            return (steps * np.nan_to_num(np.round((blocks + bottom) / steps)).clip(0, code) - bottom).reshape(
                weight.shape
            )
        group, lowest, highest, low, high = SIGNED[kind]
        blocks = weight.reshape(-1, 256 // group, group)
        scale = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1) / np.float32(low)
        most = np.take_along_axis(scale, np.abs(scale).argmax(1, keepdims=True), 1)
        d = (most / np.float32(lowest)).astype(np.float16).astype(np.float32)
        steps = d * np.nan_to_num(np.round(scale / d)).clip(lowest, highest)
        return (steps * np.nan_to_num(np.round(blocks / steps)).clip(low, high)).reshape(weight.shape)


@pytest.mark.parametrize("kind", sorted(K_QUANTS))
def test_the_search_is_worth_its_time(kind: str) -> None:
    """On normal weights the squared error is well below plain rounding's."""
    weight = 0.02 * torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    values = dequantize(encoded(weight, K_QUANTS[kind]).numpy(), GGMLQuantizationType[kind])
    ours, plain = (np.square(v - weight.numpy()).mean() for v in (values, plainly(kind, weight.numpy())))
    assert ours < 0.95 * plain


def test_five_bits_find_a_grid_of_four() -> None:
    """Weights that were stored in four bits before, as those of many models have been."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(16, (16, 512), generator=generator).float()
    scales, lows = (torch.rand(16, 16, 1, generator=generator) for _ in range(2))
    weight = (codes.unflatten(1, (16, 32)) * (0.03 + 0.03 * scales) - 0.5 * lows).flatten(1)
    values = dequantize(encoded(weight, K_QUANTS["Q5_K"]).numpy(), GGMLQuantizationType.Q5_K)
    ours, plain = (np.square(v - weight.numpy()).mean() for v in (values, plainly("Q5_K", weight.numpy())))
    assert ours < 0.4 * plain


def test_half_precision_weights_are_encoded_as_their_floats() -> None:
    weight = torch.randn(2, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    for kind in K_QUANTS.values():
        assert torch.equal(encoded(weight, kind), encoded(weight.float(), kind))
