"""Weights in the blocks of GGUF files: how they are encoded, and which blocks hold a compressed layer exactly.

The library gguf decodes every type and encodes the older ones; K quants are encoded here
(:mod:`~knowledge_compression.compression.solve.k_quants`), and IQ4_NL, which llama.cpp falls back on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, dequantize, quantize
from gguf import GGMLQuantizationType as Kind
from gguf.quants import IQ4_NL
from numpy.typing import NDArray
from torch import Tensor

from knowledge_compression.compression.solve.coding import MXFP4, CodedWeight
from knowledge_compression.compression.solve.floats import FloatWeight
from knowledge_compression.compression.solve.grid import QuantizedWeight, quantized_weight
from knowledge_compression.compression.solve.k_quants import K_QUANTS, Grid, codes_of, searched
from knowledge_compression.compression.solve.k_quants import encoded as encoded_as_k_quant
from knowledge_compression.models import TargetLayer

# The type that llama.cpp takes instead if a row is not a whole number of super-blocks.
FALLBACKS: Mapping[Kind, Kind] = {
    Kind.Q2_K: Kind.IQ4_NL,
    Kind.Q3_K: Kind.IQ4_NL,
    Kind.Q4_K: Kind.Q5_0,
    Kind.Q5_K: Kind.Q5_1,
    Kind.Q6_K: Kind.Q8_0,
}
FLOATS = (Kind.F16, Kind.BF16, Kind.F32)  # from narrow to wide

_GRIDS = {Kind.Q4_0: Grid(4, False), Kind.Q4_1: Grid(4, True), Kind.Q5_0: Grid(5, False), Kind.Q5_1: Grid(5, True)}
# Types that stand for scale * level, and their lowest and highest level.
_LEVELS: Mapping[Kind, tuple[int, int]] = {Kind.Q4_0: (-8, 7), Kind.Q5_0: (-16, 15), Kind.Q8_0: (-128, 127)}


@dataclass(frozen=True, eq=False)
class Blocks:
    """A weight as a GGUF file stores it.

    Attributes:
        kind: the type.
        data: uint8 ``[out_features, bytes of a row]``.
    """

    kind: Kind
    data: NDArray[np.uint8]

    @classmethod
    def of(cls, weight: Tensor, kind: Kind, importance: Tensor | None = None) -> Blocks:
        """The blocks of a weight ``[out_features, in_features]``, rounded to nearest.

        Args:
            weight, kind: the values to round, and the type.
            importance: weight of each input's squared errors, float32 ``[in_features]``.
        """
        return cls(kind, encoded(weight, kind, importance))

    def decode(self) -> Tensor:
        """The weight that the blocks represent, float32 ``[out_features, in_features]``."""
        return torch.from_numpy(np.require(dequantize(self.data, self.kind), requirements=["C", "W", "O"]))

    def put_into(self, layer: TargetLayer) -> None:
        """Write the weight that the blocks represent into a layer, and store the blocks with it."""
        layer.weight.copy_(self.decode())
        layer.notes["gguf_blocks"] = self

    def hold(self, layer: TargetLayer) -> bool:
        """Whether the blocks represent a layer's weight exactly, in its dtype."""
        weight = layer.weight
        return torch.equal(self.decode().to(weight), weight)


def kept_blocks(layer: TargetLayer) -> Blocks | None:
    """The blocks from which a layer's weight was made; None if there are none, or if it has changed since."""
    kept: Blocks | None = layer.notes.get("gguf_blocks")
    return kept if kept is not None and kept.hold(layer) else None


def blocks_of(layer: TargetLayer) -> Blocks | None:
    """Blocks that hold a layer's compressed weight exactly; None if no type of GGUF has its grid."""
    if (kept := kept_blocks(layer)) is not None:
        return kept
    weight = quantized_weight(layer)
    candidates: Iterable[Blocks] = ()
    if isinstance(weight, QuantizedWeight):
        candidates = _from_codes(weight)
    elif weight is not None and weight.coding.kind == MXFP4 and layer.weight.shape[1] % 32 == 0:
        candidates = [Blocks.of(layer.weight, Kind.MXFP4)]
    return next((blocks for blocks in candidates if blocks.hold(layer)), None)


def fitting(kind: Kind, width: int) -> Kind | None:
    """The type in which llama.cpp stores rows of this width when a type is requested.

    Returns:
        The type itself if its blocks fill a row, or else the one that llama.cpp falls back on; None if neither fits.
    """
    candidates = [kind, *([FALLBACKS[kind]] if kind in FALLBACKS else [])]
    return next((one for one in candidates if width % GGML_QUANT_SIZES[one][0] == 0), None)


def encoded(values: Tensor, kind: Kind, importance: Tensor | None = None) -> NDArray[Any]:
    """Values ``[..., in_features]`` in a type: float32 or float16, or the bytes of blocks.

    Importance ``[in_features]`` weighs the squared errors of all types but floats, Q8_0 and MXFP4.
    """
    rows = values.reshape(-1, values.shape[-1])
    if kind.name in K_QUANTS:
        data = encoded_as_k_quant(rows, K_QUANTS[kind.name], importance).numpy()
        return data.reshape(*values.shape[:-1], -1)
    if importance is not None and kind in _GRIDS:
        return _weighted(rows, kind, importance).reshape(*values.shape[:-1], -1)
    floats = np.ascontiguousarray(values.detach().cpu().float().numpy())
    return _nearest_levels(floats, importance) if kind == Kind.IQ4_NL else quantize(floats, kind)


def _weighted(rows: Tensor, kind: Kind, importance: Tensor) -> NDArray[Any]:
    """Blocks of 32 with a scale, and a lowest value where the type has one, searched for by weighted squared error."""
    grid = _GRIDS[kind]
    groups = rows.detach().float().cpu().reshape(-1, 1, 32)
    weights = importance.float().cpu().reshape(1, -1, 32).expand(len(rows), -1, -1).reshape(-1, 1, 32)
    scale, bottom = (part.half().float() for part in searched(groups, grid, weights))
    codes = codes_of(groups, grid, scale, bottom)[:, 0].to(torch.int16)
    if not grid.minima:
        return _packed(scale.flatten().half(), codes - grid.codes[0], kind).reshape(len(rows), -1).numpy()
    halves = [part.reshape(-1, 1).half().view(torch.uint8) for part in (scale, bottom)]
    low = (codes.reshape(-1, 2, 16) & 15).to(torch.uint8)
    parts = [*halves, *([_fifths(codes)] if kind == Kind.Q5_1 else []), low[:, 0] | (low[:, 1] << 4)]
    return torch.cat(parts, 1).reshape(len(rows), -1).numpy()


def _fifths(codes: Tensor) -> Tensor:
    """The fifth bits of 32 codes, four bytes a block."""
    bits = (codes.reshape(-1, 32) >> 4).to(torch.uint8).numpy()
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))


def narrowest(values: Tensor) -> Kind:
    """The narrowest floats that hold the values exactly; of two equally narrow types, their own."""
    if values.dtype == torch.bfloat16:
        return Kind.BF16
    for kind, dtype in zip(FLOATS, (torch.float16, torch.bfloat16), strict=False):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return kind
    return Kind.F32


def _from_codes(weight: CodedWeight) -> Iterator[Blocks]:
    """Blocks with a weight's own scales and codes, the narrowest first."""
    if isinstance(weight, QuantizedWeight):
        yield from _from_integers(weight)
    elif isinstance(weight, FloatWeight) and weight.kind == MXFP4 and weight.codes.shape[1] % 32 == 0:
        low, high = weight.codes.unflatten(1, (-1, 2, 16)).unbind(2)
        data = torch.cat([weight.scales[..., None], low | high << 4], dim=-1)
        yield Blocks(Kind.MXFP4, data.flatten(1).numpy())


def _from_integers(weight: QuantizedWeight) -> Iterator[Blocks]:
    """Blocks with the scales and codes of integers that are ``scale * (code - zero)``, the narrowest first."""
    grid, (rows, columns) = weight.grid, weight.codes.shape
    groups = grid.group_of.long()
    if columns % 32 or not torch.equal(groups.reshape(-1, 32), groups.reshape(-1, 32)[:, :1].expand(-1, 32)):
        return
    scales = grid.scales[:, groups[::32]]
    levels = weight.codes.to(torch.int16) - grid.zeros[:, groups].to(torch.int16)
    if not torch.equal(scales.half().float(), scales):
        return
    low, high = int(levels.min()), int(levels.max())
    for kind, (lowest, highest) in _LEVELS.items():
        if lowest <= low and high <= highest:
            yield Blocks(kind, _packed(scales.half(), levels - lowest, kind).reshape(rows, -1).numpy())


def _packed(scales: Tensor, codes: Tensor, kind: Kind) -> Tensor:
    """Blocks of 32: a scale, the fifth bits of Q5_0, and the codes."""
    blocks = codes.reshape(-1, 2, 16)
    halves = scales.reshape(-1, 1).contiguous().view(torch.uint8)
    if kind == Kind.Q8_0:
        return torch.cat([halves, (codes.reshape(-1, 32) - 128).to(torch.int8).view(torch.uint8)], 1)
    low = (blocks & 15).to(torch.uint8)
    nibbles = low[:, 0] | (low[:, 1] << 4)
    if kind == Kind.Q4_0:
        return torch.cat([halves, nibbles], 1)
    return torch.cat([halves, _fifths(codes), nibbles], 1)


def _nearest_levels(values: NDArray[np.float32], importance: Tensor | None) -> NDArray[np.uint8]:
    """IQ4_NL: 16 levels of unequal distance and a float16 scale for 32 weights.

    Several scales are tried for each block, each improved by least squares; the one with the least squared error,
    weighted by importance, stays.
    """
    levels = np.array(IQ4_NL.kvalues, dtype=np.float32)
    between = (levels[1:] + levels[:-1]) / 2
    blocks = values.reshape(-1, 32)
    matter: NDArray[Any] = np.ones(1, dtype=np.float32)
    if importance is not None:
        each = importance.float().cpu().numpy().reshape(1, -1, 32)
        matter = np.broadcast_to(each, (values.size // values.shape[-1], *each.shape[1:])).reshape(-1, 32)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    best, least = np.zeros_like(extreme), np.full_like(extreme, np.inf)

    def codes(scale: NDArray[np.float32]) -> NDArray[np.intp]:
        return np.digitize(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0), between)

    for reached in (levels[0], levels[0] * 0.95, levels[0] * 1.1, levels[-1], levels[-1] * 1.1):
        scale = (extreme / reached).astype(np.float32)
        found = levels[codes(scale)]
        squares = (matter * found * found).sum(1, keepdims=True)
        solved = np.divide(
            (matter * found * blocks).sum(1, keepdims=True), squares, out=scale.copy(), where=squares > 0
        )
        for attempt in (scale, solved):
            stored = attempt.astype(np.float16).astype(np.float32)
            error = (matter * np.square(levels[codes(stored)] * stored - blocks)).sum(1, keepdims=True)
            best, least = np.where(error < least, stored, best), np.minimum(error, least)
    chosen = codes(best).astype(np.uint8).reshape(-1, 2, 16)
    nibbles = chosen[:, 0] | (chosen[:, 1] << 4)
    data = np.concatenate([best.astype(np.float16).view(np.uint8), nibbles], axis=1)
    return data.reshape(*values.shape[:-1], -1)
