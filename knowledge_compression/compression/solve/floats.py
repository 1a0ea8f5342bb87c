"""Small floating-point numbers with shared scales: FP8, MXFP4 and NVFP4.

An element is E4M3 (8 bits) or E2M1 (4 bits), rounded to nearest with ties to even and clamped to the largest value. A
block of elements shares a scale, which is a float32 (FP8), a power of two in one byte (E8M0; MXFP4), or an E4M3 number
over one float32 for the whole weight (NVFP4). Everything is computed in float32.

Sources: Micikevicius et al. 2022 ("FP8 formats for deep learning"); OCP Microscaling Formats v1.0, sections 5.3.3 and
6.3; for the scales of NVFP4, compressed-tensors 0.20. ``docs/formats.md`` says where libraries differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.coding import FP8, MXFP4, NVFP4, CodedWeight, Coding
from knowledge_compression.heavy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor

    from knowledge_compression.models.targets import TargetLayer

Block = tuple[int | None, int | None]

_BITS = {FP8: 8, MXFP4: 4, NVFP4: 4}
_SCALE_BITS = {FP8: 32, MXFP4: 8, NVFP4: 8}
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
# Where E2M1 rounds up to the next of its magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6, and whether a tie does.
_UP_FROM = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
_BIAS = 127  # of E8M0
_LARGEST_POWER = 2  # base-two logarithm of the largest power of two in E2M1
_ZERO_FP8, _ZERO_NVFP4 = 2.0**-23, 0.125  # the scales that compressed-tensors gives to blocks of zeros


@dataclass(frozen=True, eq=False)
class FloatWeight(CodedWeight):
    """A weight as small floats, on the CPU; or, for a moment, a layer's inputs on the device of the layer.

    Attributes:
        kind: FP8, MXFP4 or NVFP4.
        block: outputs and inputs that share a scale; None stands for all of them.
        codes: uint8 ``[out_features, in_features]``: the bits of E4M3, or those of E2M1 in the lower half.
        scales: one per block, ``[ceil(out / block outputs), ceil(in / block inputs)]``: float32 (FP8), or as uint8 the
            bits of E8M0 (MXFP4) or E4M3 (NVFP4).
        whole: float32 ``[1]``, by which the scales of NVFP4 were multiplied; empty for the others.
        activations: whether the layer's inputs are rounded too.
        to_even: how powers of two were chosen, see :func:`mxfp4`.
    """

    kind: str
    block: Block
    codes: Tensor
    scales: Tensor
    whole: Tensor
    activations: bool = False
    to_even: bool = False

    @property
    def coding(self) -> Coding:
        """The meaning of the codes."""
        return coding_of(self.kind, self.block, activations=self.activations)

    @property
    def real_scales(self) -> Tensor:
        """The values of the scales, float32."""
        from knowledge_compression.models.checkpoints.codes import powers_of_two

        if self.kind == MXFP4:
            return powers_of_two(self.scales)
        if self.kind == NVFP4:
            return self.scales.view(torch.float8_e4m3fn).float() / self.whole
        return self.scales

    def dequantize(self) -> Tensor:
        """Each number times its scale, float32, rounded once; a scale of NVFP4 is computed and rounded first."""
        from knowledge_compression.models.checkpoints.codes import FP4

        eight = _BITS[self.kind] == 8
        table = torch.tensor(FP4, device=self.codes.device)
        numbers = self.codes.view(torch.float8_e4m3fn).float() if eight else table[self.codes.int()]
        return numbers * _spread(self.real_scales, self.block, self.codes.shape)

    def rows(self, start: int, end: int) -> FloatWeight:
        """The part of some output rows."""
        outputs, _ = _sizes(self.block, self.codes.shape)
        scales = self.scales if self.block[0] is None else self.scales[start // outputs : -(-end // outputs)]
        return replace(self, codes=self.codes[start:end], scales=scales)

    def put_into(self, layer: TargetLayer) -> None:
        """Write the weight into the layer, and store these codes with its module."""
        layer.weight.copy_(self.dequantize())
        layer.notes["quantized_weight"] = self

    @property
    def overhead_bits(self) -> int:
        """Bits for all scales."""
        return self.scales.numel() * _SCALE_BITS[self.kind] + 32 * self.whole.numel()

    def report(self, layer: TargetLayer) -> LayerReport:
        """Bits of the numbers, and of all scales."""
        return LayerReport.of(layer, bits=float(_BITS[self.kind]), overhead_bits=self.overhead_bits)

    def taken_apart(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Codes and scales."""
        tensors = {name: getattr(self, name) for name in ("codes", "scales", "whole")}
        return tensors, {"block": list(self.block), "activations": self.activations, "to_even": self.to_even}

    @classmethod
    def put_together(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> FloatWeight:
        """The inverse of :meth:`taken_apart`."""
        first, second = settings["block"]
        return cls(
            settings["kind"],
            (first, second),
            tensors["codes"],
            tensors["scales"],
            tensors["whole"],
            activations=settings["activations"],
            to_even=settings["to_even"],
        )


def coding_of(kind: str, block: Block, *, activations: bool = False) -> Coding:
    """The meaning of such codes."""
    return Coding(kind, _BITS[kind], block, scale_bits=_SCALE_BITS[kind], activations=activations)


def fp8(weight: Tensor, block: Block) -> FloatWeight:
    """E4M3 with a float32 scale per block: its largest magnitude becomes 448.

    Args:
        weight: ``[out_features, in_features]``, finite, of any floating dtype.
        block: outputs and inputs that share a scale; None stands for all of them.
    """
    return _fp8(weight.to("cpu", torch.float32), block)


def _fp8(values: Tensor, block: Block) -> FloatWeight:
    scales = _largest(values, block) / _E4M3_MAX
    scales = torch.where(scales == 0, _ZERO_FP8, scales)
    codes = (values / _spread(scales, block, values.shape)).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return FloatWeight(FP8, block, codes.view(torch.uint8), scales, torch.empty(0))


def mxfp4(weight: Tensor, *, to_even: bool = False) -> FloatWeight:
    """E2M1 with a power of two per 32 inputs (OCP Microscaling Formats v1.0, section 6.3).

    Args:
        weight: ``[out_features, in_features]``, finite, of any floating dtype.
        to_even: round a block's largest magnitude to one bit of mantissa before its power of two is taken, so that a
            magnitude of 7 times the scale does not have to become 6; otherwise the power of two is rounded down.
    """
    return _mxfp4(weight.to("cpu", torch.float32), to_even)


def _mxfp4(values: Tensor, to_even: bool) -> FloatWeight:
    block = (1, 32)
    fractions, exponents = torch.frexp(_largest(values, block))  # a fraction in [0.5, 1), or 0
    exponents = exponents - 1 + (fractions >= 0.875).int() * to_even
    exponents = torch.where(fractions == 0, -_BIAS, exponents - _LARGEST_POWER).clamp(-_BIAS, _BIAS)
    shares = torch.ldexp(values, -_spread(exponents, block, values.shape))
    scales = (exponents + _BIAS).to(torch.uint8)
    return FloatWeight(MXFP4, block, _e2m1(shares), scales, torch.empty(0), to_even=to_even)


def nvfp4(weight: Tensor) -> FloatWeight:
    """E2M1 with an E4M3 scale per 16 inputs, over one float32 for the whole weight.

    That float32 is ``448 * 6`` over the largest magnitude of the weight, so that the largest scale is 448.

    Args:
        weight: ``[out_features, in_features]``, finite, of any floating dtype.
    """
    weight = weight.to("cpu", torch.float32)
    return _nvfp4(weight, weight.abs().amax().reshape(1))


def _nvfp4(values: Tensor, largest: Tensor) -> FloatWeight:
    """As :func:`nvfp4`, given the largest magnitude of the whole weight, ``[1]``, or of each row, ``[rows, 1]``."""
    block = (1, 16)
    largest = largest.clamp(min=torch.finfo(torch.float32).tiny)
    # A product with the reciprocal, as in compressed-tensors, which differs from a quotient by a rounding.
    whole = (largest.reciprocal() * (_E4M3_MAX * _E2M1_MAX)).nan_to_num(posinf=1.0)
    scales = (whole * (_largest(values, block) / _E2M1_MAX)).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
    scales = torch.where(scales == 0, _ZERO_NVFP4, scales)
    shares = values / _spread(scales / whole, block, values.shape)
    return FloatWeight(NVFP4, block, _e2m1(shares), scales.to(torch.float8_e4m3fn).view(torch.uint8), whole)


def rounded_tokens(values: Tensor, kind: str, block: Block, *, to_even: bool = False) -> Tensor:
    """Inputs of a layer, rounded to small floats with scales from each token alone.

    Args:
        values: ``[..., in_features]``, float32, on any device; values that are not finite stay as they are.
        kind: FP8, MXFP4 or NVFP4; NVFP4's float32 is computed for each token.
        block: the block of the layer's weight; FP8 uses its number of inputs.
        to_even: see :func:`mxfp4`.
    """
    if not values.numel():
        return values
    rows = values.flatten(0, -2)
    if kind == FP8:
        coded = _fp8(rows, (1, block[1]))
    else:
        coded = _mxfp4(rows, to_even) if kind == MXFP4 else _nvfp4(rows, rows.abs().amax(1, keepdim=True))
    return torch.where(values.isfinite(), coded.dequantize().view_as(values), values)


def _e2m1(values: Tensor) -> Tensor:
    above = torch.tensor([edge for edge, _ in _UP_FROM], device=values.device)
    ties = torch.tensor([tie for _, tie in _UP_FROM], device=values.device)
    edges = torch.where(ties, above, above.nextafter(torch.full_like(above, torch.inf)))
    codes = torch.bucketize(values.abs().contiguous(), edges, right=True).to(torch.uint8)
    return codes | (values.signbit().to(torch.uint8) << 3)


def _sizes(block: Block, shape: tuple[int, ...]) -> tuple[int, int]:
    outputs, inputs = (all_of if size is None else size for size, all_of in zip(block, shape, strict=True))
    return outputs, inputs


def _largest(weight: Tensor, block: Block) -> Tensor:
    """The largest magnitude of each block; the last ones may be smaller."""
    outputs, inputs = _sizes(block, weight.shape)
    rows, columns = weight.shape
    padded = functional.pad(weight.abs(), (0, -columns % inputs, 0, -rows % outputs))
    return padded.unflatten(1, (-1, inputs)).unflatten(0, (-1, outputs)).amax((1, 3))


def _spread(scales: Tensor, block: Block, shape: tuple[int, ...]) -> Tensor:
    """Values per block, expanded to all weights of the block."""
    from knowledge_compression.models.checkpoints.codes import spread

    return spread(scales, shape, _sizes(block, shape))
