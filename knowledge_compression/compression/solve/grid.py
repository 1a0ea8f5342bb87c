"""Integer grids for weights: how a row, or a group of its columns, is rounded to a few bits.

A weight ``w`` becomes the code ``q = clamp(round(w / s) + z, 0, 2^bits - 1)`` and reads back as ``s (q - z)``, with a
scale ``s`` and a whole-numbered zero point ``z`` for each output row and group of input columns. Zero is on every grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.coding import INTEGERS, CodedWeight, Coding
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models.targets import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor

CLIPS = ("minmax", "mse")
_SHARES = [1 - step / 10 for step in range(8)]  # shares of the span that `mse` tries
_BETWEEN = 0.05  # then as many more above and below the best of them
_SCALES = {16: "float16", 32: "float32"}  # by their bits
_IN_CACHE = 1 << 18  # values
_TENSORS, _SETTINGS = ("scales", "zeros", "group_of"), ("bits", "symmetric", "scale_bits")  # of a fitted grid
SCALE_BITS = 16  # float16, the type of scales in packed checkpoints


@dataclass(frozen=True, eq=False)
class FittedGrid:
    """The grid that a weight was rounded to; all tensors are on the CPU.

    Attributes:
        scales: float32 ``[out_features, groups]``, every value exactly representable in a float of ``scale_bits``.
        zeros: uint8 ``[out_features, groups]``.
        group_of: int32 ``[in_features]``, the group of each input column (``g_idx`` of packed checkpoints).
        bits: width of a code.
        symmetric: whether every zero point is ``2^(bits - 1)``.
        scale_bits: width of a scale.
    """

    scales: Tensor
    zeros: Tensor
    group_of: Tensor
    bits: int
    symmetric: bool
    scale_bits: int

    def codes(self, weight: Tensor) -> Tensor:
        """The codes nearest to a weight ``[out_features, in_features]`` of any floating dtype, uint8 on the CPU.

        For a float32 weight on the grid they are exactly the codes that it was made from, because its quotient by the
        scale lies next to a whole number.
        """
        nearest = encoded(weight.to("cpu", torch.float32), *self._columns(), 2**self.bits - 1)
        return nearest.to(torch.uint8, memory_format=torch.contiguous_format)

    def read(self, codes: Tensor) -> Tensor:
        """The weight that codes ``[out_features, in_features]`` represent, float32."""
        return dequantized(codes, *self._columns())

    def _columns(self) -> tuple[Tensor, Tensor]:
        return spread(self.scales, self.group_of, 1), spread(self.zeros, self.group_of, 1)

    def rows(self, start: int, end: int) -> FittedGrid:
        """The part of some output rows."""
        return replace(self, scales=self.scales[start:end], zeros=self.zeros[start:end])

    @property
    def coding(self) -> Coding:
        """The meaning of the codes."""
        group = int(self.group_of.bincount().max()) if self.scales.shape[1] > 1 else None
        in_order = bool((self.group_of.diff() >= 0).all())
        return Coding(INTEGERS, self.bits, (1, group), in_order, self.symmetric, self.scale_bits)

    @property
    def groups_alike(self) -> bool:
        """Whether all groups have the same number of columns; otherwise the last one in the ordering has fewer."""
        return len(self.group_of.bincount().unique()) == 1

    @property
    def overhead_bits(self) -> int:
        """Bits for scales and, if they vary, zero points."""
        return self.scales.numel() * (self.scale_bits + (0 if self.symmetric else self.bits))


@dataclass(frozen=True, eq=False)
class QuantizedWeight(CodedWeight):
    """A weight as integer codes, from which a packed checkpoint is written.

    Attributes:
        codes: uint8 ``[out_features, in_features]`` on the CPU, with columns in the layer's own order.
        grid: the scales and zero points of the codes.
    """

    codes: Tensor
    grid: FittedGrid

    @classmethod
    def made(cls, codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, grid: Grid) -> QuantizedWeight:
        """Build one from tensors of any dtype and device."""
        fitted = FittedGrid(
            scales.to("cpu", torch.float32).contiguous(),
            zeros.to("cpu", torch.uint8).contiguous(),
            group_of.to("cpu", torch.int32),
            grid.bits,
            grid.symmetric,
            grid.scale_bits,
        )
        return cls(codes.to("cpu", torch.uint8).contiguous(), fitted)

    @property
    def coding(self) -> Coding:
        """The meaning of the codes."""
        return self.grid.coding

    def dequantize(self) -> Tensor:
        """The weight that the codes represent, float32 ``[out_features, in_features]``."""
        return self.grid.read(self.codes)

    def taken_apart(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Codes and grid."""
        tensors = {"codes": self.codes} | {name: getattr(self.grid, name).clone() for name in _TENSORS}
        return tensors, {name: getattr(self.grid, name) for name in _SETTINGS}

    @classmethod
    def put_together(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> QuantizedWeight:
        """The inverse of :meth:`taken_apart`."""
        parts = {name: tensors[name] for name in _TENSORS} | {name: settings[name] for name in _SETTINGS}
        return cls(tensors["codes"], FittedGrid(**parts))

    def rows(self, start: int, end: int) -> QuantizedWeight:
        """The part of some output rows: one layer, if several were quantized as one weight."""
        return QuantizedWeight(self.codes[start:end], self.grid.rows(start, end))

    def put_into(self, layer: TargetLayer) -> None:
        """Write the weight that these codes represent into the layer, and store with its module what is needed to
        recover them.

        That is the grid alone, unless the layer's dtype is too coarse to distinguish all its points.
        """
        layer.weight.copy_(self.dequantize())
        exact = layer.weight.dtype == torch.float32 or torch.equal(self.grid.codes(layer.weight), self.codes)
        # neither a parameter nor part of the state dict
        layer.notes["quantized_weight"] = self.grid if exact else self

    def report(self, layer: TargetLayer) -> LayerReport:
        """The report on a layer that got these codes."""
        return LayerReport.of(
            layer,
            bits=float(self.grid.bits),
            overhead_bits=self.grid.overhead_bits,
            fallbacks=[] if self.grid.groups_alike else ["short_group"],
        )


def quantized_weight(layer: TargetLayer) -> CodedWeight | None:
    """The codes of a layer's weight; None if it was not quantized or its weight has changed since."""
    kept: FittedGrid | CodedWeight | None = getattr(layer.replacement, "coded", layer.notes.get("quantized_weight"))
    if isinstance(kept, FittedGrid):
        kept = QuantizedWeight(kept.codes(layer.weight), kept)
    if kept is None or not torch.equal(kept.dequantize().to(layer.weight), layer.weight):
        return None
    return kept


def spread(values: Tensor, group_of: Tensor, dim: int) -> Tensor:
    """Expand per-group values to columns; a single group is returned unchanged, to be broadcast."""
    return values if values.shape[dim] == 1 else values.index_select(dim, group_of)


def encoded(weight: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    """Codes, from 0 to ``top``, of the nearest grid points, in the weight's dtype; shapes broadcast."""
    return (weight / scales).round_().add_(zeros).clamp_(0, top)


def dequantized(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """``s (q - z)`` in the scales' dtype; shapes broadcast."""
    return scales * (codes.to(scales.dtype) - zeros.to(scales.dtype))


@dataclass(frozen=True)
class Grid:
    """The settings of a grid; methods hold one and fit it to the weights.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: input columns that share a scale; None takes the whole row (per channel).
        symmetric: whether the zero point is fixed at the middle of the range.
        clip: ``minmax`` (the grid spans all values) or ``mse`` (it clips extreme values if the finer grid for the rest
            then makes the squared rounding error smaller).
        scale_bits: 16 or 32, the width of the scales as floating-point numbers; packed checkpoints hold 16.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False
    clip: str = "minmax"
    scale_bits: int = SCALE_BITS

    def __post_init__(self) -> None:
        """Refuse settings that no packed format holds."""
        if self.bits not in (2, 3, 4, 8):
            raise BadInput(f"compression.bits={self.bits} is not offered; choose 2, 3, 4 or 8")
        if self.group_size is not None and self.group_size < 1:
            raise BadInput(
                f"compression.group_size={self.group_size} is not a number of columns; choose 32, 64, 128 or null"
            )
        if self.clip not in CLIPS:
            raise BadInput(f"compression.clip={self.clip} does not exist; choose one of {', '.join(CLIPS)}")
        if self.scale_bits not in _SCALES:
            raise BadInput(f"compression.scale_bits={self.scale_bits} is not a width of scales; choose 16 or 32")

    @property
    def top(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    def coding(self, *, in_order: bool = True) -> Coding:
        """The meaning of codes on this grid.

        Args:
            in_order: whether the inputs of a group are neighbours.
        """
        return Coding(INTEGERS, self.bits, (1, self.group_size), in_order, self.symmetric, self.scale_bits)

    def check(self, layers: Sequence[TargetLayer], *, whole: bool = True) -> None:
        """Refuse a group size that exceeds a layer's number of inputs, or does not divide it.

        Args:
            layers: the layers to quantize.
            whole: whether every group must have the full size; otherwise the last may be shorter.
        """
        for layer in layers:
            width = layer.weight.shape[1]
            if self.group_size is not None and (self.group_size > width or (whole and width % self.group_size)):
                raise BadInput(
                    f"compression.group_size={self.group_size} does not divide the {width} inputs of {layer.path}; "
                    "choose a divisor, or null for one scale per row"
                )

    def width(self, in_features: int) -> int:
        """The number of columns in a group, for a layer with this many inputs."""
        return self.group_size or in_features

    def stored_bits(self, layer: TargetLayer) -> int:
        """The bits of a layer on this grid: its codes, scales and, if they vary, zero points."""
        rows, columns = layer.weight.shape
        groups = -(-columns // self.width(columns))
        return int(rows * (columns * self.bits + groups * (self.scale_bits + (0 if self.symmetric else self.bits))))

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales and zero points for the values along the last dimension of ``weight``.

        Args:
            weight: float32 ``[..., columns]``.
            importance: weight of each column's squared error for ``mse``, ``[columns]``; equal weights if None.

        Returns:
            Scales and zero points, float32 ``[..., 1]``.
        """
        low, high = weight.amin(-1, keepdim=True).clamp(max=0), weight.amax(-1, keepdim=True).clamp(min=0)
        if self.clip == "mse":
            rows = max(1, _IN_CACHE // weight[0].numel())  # few enough rows to stay in the processor's cache
            shares = torch.cat(
                [
                    self._best_shares(*parts, importance)
                    for parts in zip(weight.split(rows), low.split(rows), high.split(rows), strict=True)
                ]
            )
            low, high = low * shares, high * shares
        return self._spanning(low, high)

    def _best_shares(self, weight: Tensor, low: Tensor, high: Tensor, importance: Tensor | None) -> Tensor:
        """The shares of the spans with the least squared rounding error among those tried."""
        best, least = torch.ones_like(low), torch.full_like(low, torch.inf)

        def attempt(shares: Tensor | float) -> None:
            nonlocal best, least
            error = self._error(weight, *self._spanning(low * shares, high * shares), importance)
            best = torch.where(error < least, shares, best)
            least = torch.minimum(error, least)

        for share in _SHARES:
            attempt(share)
        coarse = best
        for step in (_BETWEEN, -_BETWEEN):
            attempt((coarse + step).clamp(max=1))
        return best

    def _error(self, weight: Tensor, scales: Tensor, zeros: Tensor, importance: Tensor | None) -> Tensor:
        # In units of the grid step, which saves two passes over the values, and from its lowest point, as bounds that
        # are tensors would take as long as all the rest.
        wanted = (weight * scales.reciprocal()).add_(zeros)
        error = wanted.round().clamp_(0, self.top).sub_(wanted).square_()
        return (error if importance is None else error.mul_(importance)).sum(-1, keepdim=True).mul_(scales.square())

    def encode(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """Codes of the nearest grid points, in the weight's dtype; shapes broadcast."""
        return encoded(weight, scales, zeros, self.top)

    def round(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest grid points themselves; shapes broadcast."""
        return dequantized(self.encode(weight, scales, zeros), scales, zeros)

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest grid points of ``[out_features, in_features]``, each group on its own grid, in the weight's
        dtype.

        The last group has fewer columns if the group size does not divide the number of inputs.
        """
        width = self.width(weight.shape[1])
        whole = weight.shape[1] - weight.shape[1] % width
        groups = [weight[:, :whole].unflatten(1, (-1, width)), weight[:, whole:].unsqueeze(1)]
        return torch.cat([self.round(part, *self.fit(part)).flatten(1) for part in groups if part.numel()], dim=1)

    def _spanning(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales = storable((high - low) / self.top, float_of(self.scale_bits))
        zeros = torch.full_like(scales, 2 ** (self.bits - 1)) if self.symmetric else torch.round(-low / scales)
        return scales, zeros.clamp(0, self.top)


def float_of(bits: int) -> torch.dtype:
    """The type of a scale of this width."""
    found: torch.dtype = getattr(torch, _SCALES[bits])
    return found


def storable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest positive scales that a floating dtype can represent; a row of zeros gets 1."""
    limits = torch.finfo(dtype)
    nearest = scales.to(dtype).to(scales).clamp(min=limits.smallest_normal * limits.eps, max=limits.max)
    return torch.where(scales > 0, nearest, torch.ones_like(scales))


class GroupedColumns:
    """The grids of a weight's groups while its columns are rounded in some order.

    Args:
        grid: the settings of the grids.
        rows: output features.
        group_of: the group of each column, in the order in which they are rounded, int64 ``[in_features]``.
    """

    def __init__(self, grid: Grid, rows: int, group_of: Tensor) -> None:
        self.grid = grid
        groups = int(group_of.max()) + 1
        self._group_of = group_of
        self._groups = group_of.tolist()
        self._scales = torch.ones(groups, rows, device=group_of.device)
        self._zeros = torch.zeros_like(self._scales)
        self._steps: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def fit(self, group: int, columns: Tensor, importance: Tensor) -> None:
        """Choose a group's grid for ``columns`` ``[columns, rows]``."""
        scales, zeros = self.grid.fit(columns.T, importance)
        self._scales[group], self._zeros[group] = scales[:, 0], zeros[:, 0]
        lowest = -self._zeros[group]
        self._steps[group] = self._scales[group], lowest, lowest + self.grid.top

    def round(self, i: int, column: Tensor) -> Tensor:
        """Round the ``i``-th column in the order."""
        scales, lowest, highest = self._steps[self._groups[i]]
        return (column / scales).round_().clamp_(lowest, highest).mul_(scales)  # in place: there are many columns

    def quantized(self, columns: Tensor, order: Tensor) -> QuantizedWeight:
        """The codes of all columns, once rounded, rearranged from ``order`` to the layer's own order."""
        scales, zeros = (spread(values, self._group_of, 0) for values in (self._scales, self._zeros))
        back = torch.argsort(order)
        codes = self.grid.encode(columns, scales, zeros)[back].T
        return QuantizedWeight.made(codes, self._scales.T, self._zeros.T, self._group_of[back], self.grid)


def plainly_rounded(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> QuantizedWeight:
    """Round ``[out_features, in_features]`` to nearest; ``importance`` ``[in_features]`` is as in :meth:`Grid.fit`."""
    inputs = weight.shape[1]
    width = grid.width(inputs)
    parts = []
    for part in (slice(0, inputs - inputs % width), slice(inputs - inputs % width, inputs)):  # the last may be short
        if columns := len(range(inputs)[part]):
            shape = (-1, min(width, columns))
            grouped = weight[:, part].float().unflatten(1, shape)
            scales, zeros = grid.fit(grouped, None if importance is None else importance[part].unflatten(0, shape))
            parts.append((grid.encode(grouped, scales, zeros).flatten(1), scales[..., 0], zeros[..., 0]))
    codes, scales, zeros = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    return QuantizedWeight.made(codes, scales, zeros, torch.arange(inputs) // width, grid)
