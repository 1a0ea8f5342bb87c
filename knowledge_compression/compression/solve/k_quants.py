"""K quants: 256 neighbouring weights share a super-block, whose groups have scales that are small integers.

The blocks are those of ggml's definition, as llama.cpp's files hold them. A type with minima stands for
``d * scale * code - d_min * minimum``, one without for ``d * scale * code`` with signed codes; ``d`` and ``d_min``
are float16 and shared by the super-block, ``scale`` and ``minimum`` belong to a group of 16 or 32 weights.

The fit is ours and minimizes the squared rounding error: for each group several grids are tried, each improved by least
squares; the scales are rounded to their integers, and ``d`` and ``d_min`` are then solved for again. A super-block for
which plain rounding has less error is rounded plainly. Where the importance of each input is given (the mean of its
squares on some text), squared errors are weighted by it, as llama.cpp's importance matrices do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SUPER_BLOCK = 256
_AT_ONCE = 1024  # super-blocks, few enough to stay in the processor's cache
# Sizes of a grid relative to the one that spans all values. The last makes a 4-bit step two steps of a 5-bit grid.
_STRETCHES = (0.7, 0.775, 0.85, 0.9, 0.95, 0.98, 1.0, 1.015, 1.034)
_ROUNDS = 2  # rounds of solving for the shared scales
_HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Grid:
    """Codes that stand for ``scale * code``, or for ``scale * code + lowest``.

    Attributes:
        bits: bits of a code.
        minima: whether groups have a lowest value; codes then start at 0, otherwise they are signed.
    """

    bits: int
    minima: bool

    @property
    def codes(self) -> tuple[int, int]:
        """The lowest and highest code."""
        half = 1 << (self.bits - 1)
        return (0, 2 * half - 1) if self.minima else (-half, half - 1)


@dataclass(frozen=True)
class KQuant(Grid):
    """A type of K quants.

    Attributes:
        group: weights that share an integer scale.
        scales: the lowest and highest integer scale, and the range of minima.
        pack: makes the bytes of super-blocks from ``d``, ``d_min`` (float16 ``[blocks, 1]``), scales and minima (int64
            ``[blocks, groups]``), and codes (int64 ``[blocks, 256]``).
    """

    group: int
    scales: tuple[int, int]
    pack: Callable[[Fitted], Tensor]


@dataclass(frozen=True)
class Fitted:
    """The contents of super-blocks.

    Attributes:
        d, d_min: float32 ``[blocks, 1, 1]``, values of float16.
        scale, minimum: ``[blocks, groups, 1]``, whole numbers.
        code: ``[blocks, groups, group]``, whole numbers.
    """

    d: Tensor
    d_min: Tensor
    scale: Tensor
    minimum: Tensor
    code: Tensor

    @property
    def values(self) -> Tensor:
        """The weights that they represent."""
        return self.d * self.scale * self.code - self.d_min * self.minimum

    def error(self, weights: Tensor, importance: Tensor | None) -> Tensor:
        """Sum of squared differences from the weights, ``[blocks, 1, 1]``."""
        return _total((self.values - weights).square(), importance, (1, 2))

    def where(self, better: Tensor, other: Fitted) -> Fitted:
        """The super-blocks of ``other`` where ``better`` ``[blocks, 1, 1]`` is true."""
        pairs = [(getattr(other, name), getattr(self, name)) for name in self.__dataclass_fields__]
        return Fitted(*(torch.where(better, new, old) for new, old in pairs))


def encoded(weight: Tensor, kind: KQuant, importance: Tensor | None = None) -> Tensor:
    """The bytes of a weight.

    Args:
        weight: floating ``[out_features, in_features]``, with a multiple of 256 inputs.
        kind: the type.
        importance: weight of each input's squared errors, ``[in_features]``; None if all are equal.

    Returns:
        uint8 ``[out_features, bytes of a row]`` on the CPU.
    """
    shape = (-1, SUPER_BLOCK // kind.group, kind.group)
    blocks = weight.detach().float().reshape(shape)
    parts = blocks.split(_AT_ONCE)
    matters: Sequence[Tensor | None] = [None] * len(parts)
    if importance is not None:
        each = importance.to(blocks).expand(len(weight), -1).reshape(shape)
        matters = each.split(_AT_ONCE)
    data = torch.cat([kind.pack(_fitted(part, kind, matter)) for part, matter in zip(parts, matters, strict=True)])
    return data.reshape(len(weight), -1).cpu()


def _fitted(weights: Tensor, kind: KQuant, importance: Tensor | None) -> Fitted:
    best = plain = _shared(weights, kind, *_spanning(weights, kind))
    least = plain.error(weights, importance)
    first = _shared(weights, kind, *searched(weights, kind, importance))
    for attempt in [first, *_resolved(weights, kind, first, importance)]:
        error = attempt.error(weights, importance)
        best = best.where(error < least, attempt)
        least = torch.minimum(error, least)
    return best


def _total(values: Tensor, importance: Tensor | None, along: int | tuple[int, ...] = -1) -> Tensor:
    """A sum of values, weighted by importance."""
    return (values if importance is None else values * importance).sum(along, keepdim=True)


def _spanning(weights: Tensor, kind: Grid, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """A scale and a lowest value of each group, ``[blocks, groups, 1]``: the grid that just holds all its values."""
    low, high = kind.codes
    if kind.minima:
        bottom = weights.amin(-1, keepdim=True).clamp(max=0) * stretch
        return (weights.amax(-1, keepdim=True) * stretch - bottom).clamp(min=0) / high, bottom
    largest = weights.gather(-1, weights.abs().argmax(-1, keepdim=True))  # takes the lowest code, which is the farthest
    return largest * stretch / low, torch.zeros_like(largest)


def searched(weights: Tensor, kind: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scale and lowest value of each group with the least squared error among those tried.

    Args:
        weights: float32 ``[blocks, groups, group]``.
        kind: the available codes.
        importance: the importance of each weight, of the same shape; None if all are equal.
    """
    best: tuple[Tensor, Tensor] | None = None
    least = torch.empty(0)
    for stretch in _STRETCHES:
        scale, bottom = _spanning(weights, kind, stretch)
        scale, bottom = _least_squares(weights, codes_of(weights, kind, scale, bottom), kind, importance)
        error = _total((scale * codes_of(weights, kind, scale, bottom) + bottom - weights).square(), importance)
        if best is None:
            best, least = (scale, bottom), error
            continue
        better = error < least
        best = torch.where(better, scale, best[0]), torch.where(better, bottom, best[1])
        least = torch.minimum(error, least)
    assert best is not None
    return best


def codes_of(weights: Tensor, kind: Grid, scale: Tensor, bottom: Tensor) -> Tensor:
    """The nearest codes, as whole numbers in float32."""
    return _quotient(weights - bottom, scale).round_().clamp_(*kind.codes)


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the divisor is 0."""
    return torch.where(denominator != 0, numerator / denominator, 0.0)


def _least_squares(weights: Tensor, codes: Tensor, kind: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and lowest value of each group that fit best with these codes; the lowest value is never above 0."""
    products, squares = _total(codes * weights, importance), _total(codes.square(), importance)
    through_zero = _quotient(products, squares)
    if not kind.minima:
        return through_zero, torch.zeros_like(through_zero)
    if importance is None:
        count: Tensor | int = codes.shape[-1]
        mean, middle = weights.mean(-1, keepdim=True), codes.mean(-1, keepdim=True)
    else:
        count = importance.sum(-1, keepdim=True)
        mean, middle = (_quotient(_total(one, importance), count) for one in (weights, codes))
    scale = _quotient(products - count * mean * middle, squares - count * middle.square())
    bottom = mean - scale * middle
    below = bottom <= 0
    return torch.where(below, scale, through_zero).clamp(min=0), torch.where(below, bottom, 0.0)


def _shared(weights: Tensor, kind: KQuant, scale: Tensor, bottom: Tensor) -> Fitted:
    """Super-blocks with these scales and lowest values, as near as the integers come."""
    lowest, highest = kind.scales
    if kind.minima:
        d, d_min = (_half(part.amax(1, keepdim=True) / highest) for part in (scale, -bottom))
    else:
        largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
        d, d_min = _half(largest / lowest), torch.zeros_like(largest)
    whole = _quotient(scale, d).round_().clamp_(lowest, highest)
    minimum = _quotient(-bottom, d_min).round_().clamp_(0, highest)
    return Fitted(d, d_min, whole, minimum, codes_of(weights, kind, d * whole, -d_min * minimum))


def _resolved(weights: Tensor, kind: KQuant, fitted: Fitted, importance: Tensor | None) -> list[Fitted]:
    """The same super-blocks after repeatedly solving for ``d`` and ``d_min`` and choosing the codes again."""
    attempts = []
    for _ in range(_ROUNDS):
        steps, offsets = fitted.scale * fitted.code, fitted.minimum.expand_as(fitted.code)
        ss, so, oo, sw, ow = (
            _total(one * other, importance, (1, 2))
            for one, other in (
                (steps, steps),
                (steps, offsets),
                (offsets, offsets),
                (steps, weights),
                (offsets, weights),
            )
        )
        if kind.minima:
            determinant = ss * oo - so.square()
            d = _quotient(oo * sw - so * ow, determinant)
            d_min = _quotient(so * sw - ss * ow, determinant)
            solvable = (d > 0) & (d_min > 0)
            d, d_min = torch.where(solvable, d, fitted.d), torch.where(solvable, d_min, fitted.d_min)
        else:
            d, d_min = _quotient(sw, ss), fitted.d_min
        d, d_min = _half(d), _half(d_min)
        codes = codes_of(weights, kind, d * fitted.scale, -d_min * fitted.minimum)
        fitted = Fitted(d, d_min, fitted.scale, fitted.minimum, codes)
        attempts.append(fitted)
    return attempts


def _half(values: Tensor) -> Tensor:
    """The nearest values of float16, in float32."""
    return values.clamp(_HALF.min, _HALF.max).half().float()


def _bytes(values: Tensor) -> Tensor:
    """Whole numbers from -128 to 255 as bytes."""
    return values.to(torch.int64).bitwise_and(0xFF).to(torch.uint8)


def _half_bytes(values: Tensor) -> Tensor:
    return values.reshape(-1, 1).half().view(torch.uint8)


def _planes(values: Tensor, run: int, bits: int) -> Tensor:
    """Pack fields of ``bits`` bits: of each ``8 / bits`` runs of ``run`` values, the first is in the lowest bits."""
    parts = values.reshape(len(values), -1, 8 // bits, run).to(torch.int64)
    shifts = bits * torch.arange(8 // bits, device=values.device).reshape(1, 1, -1, 1)
    return (parts << shifts).sum(2).to(torch.uint8).flatten(1)


def _pack_2(fitted: Fitted) -> Tensor:
    scales = (fitted.scale + 16 * fitted.minimum).flatten(1)
    codes = _planes(fitted.code.flatten(1), 32, 2)
    return torch.cat([_bytes(scales), codes, _half_bytes(fitted.d), _half_bytes(fitted.d_min)], 1)


def _pack_3(fitted: Fitted) -> Tensor:
    codes = (fitted.code.flatten(1) + 4).to(torch.int64)
    scales = (fitted.scale.flatten(1) + 32).to(torch.int64)
    low = _planes(scales & 15, 8, 4)
    high = _planes(scales >> 4, 4, 2)
    return torch.cat([_planes(codes >> 2, 32, 1), _planes(codes & 3, 32, 2), low, high, _half_bytes(fitted.d)], 1)


def _six_bits(fitted: Fitted) -> Tensor:
    """Eight scales and eight minima of six bits each in twelve bytes."""
    scale, minimum = (part.flatten(1).to(torch.int64) for part in (fitted.scale, fitted.minimum))
    first = scale[:, :4] | (scale[:, 4:] >> 4 << 6)
    second = minimum[:, :4] | (minimum[:, 4:] >> 4 << 6)
    return _bytes(torch.cat([first, second, (scale[:, 4:] & 15) | ((minimum[:, 4:] & 15) << 4)], 1))


def _pack_4(fitted: Fitted) -> Tensor:
    codes = _planes(fitted.code.flatten(1), 32, 4)
    return torch.cat([_half_bytes(fitted.d), _half_bytes(fitted.d_min), _six_bits(fitted), codes], 1)


def _pack_5(fitted: Fitted) -> Tensor:
    codes = fitted.code.flatten(1).to(torch.int64)
    high, low = _planes(codes >> 4, 32, 1), _planes(codes & 15, 32, 4)
    return torch.cat([_half_bytes(fitted.d), _half_bytes(fitted.d_min), _six_bits(fitted), high, low], 1)


def _pack_6(fitted: Fitted) -> Tensor:
    codes = (fitted.code.flatten(1) + 32).to(torch.int64)
    low, high = _planes(codes & 15, 64, 4), _planes(codes >> 4, 32, 2)
    return torch.cat([low, high, _bytes(fitted.scale.flatten(1)), _half_bytes(fitted.d)], 1)


# By ggml's names:
K_QUANTS: Mapping[str, KQuant] = {
    "Q2_K": KQuant(2, True, 16, (0, 15), _pack_2),
    "Q3_K": KQuant(3, False, 16, (-32, 31), _pack_3),
    "Q4_K": KQuant(4, True, 32, (0, 63), _pack_4),
    "Q5_K": KQuant(5, True, 32, (0, 63), _pack_5),
    "Q6_K": KQuant(6, False, 16, (-128, 127), _pack_6),
}
