"""A weight as signed 8-bit integers, for layers that round their inputs to integers too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.coding import INT8, CodedWeight, Coding
from knowledge_compression.errors import BadInput
from knowledge_compression.models.targets import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor

SEVEN_BITS = 7  # of inputs whose range is fixed: the codes 0 to 127
INPUT_STEPS = (127.0, 127.5)  # between zero and a token's largest magnitude: as in SmoothQuant, or compressed-tensors


@dataclass(frozen=True, eq=False)
class Int8Weight(CodedWeight):
    """The integers of an int8 layer, on the CPU.

    Attributes:
        codes: int8 ``[out_features, in_features]``.
        scales: float32 ``[out_features, 1]``; a weight is its code times its scale.
        input_scale, input_zero: float32 and int32 scalars, if the range of the inputs is fixed: an input is rounded to
            ``input_scale * (code - input_zero)``, with codes from 0 to 127. Otherwise None: each token's largest
            magnitude spans :attr:`input_steps`.
        input_steps: one of :data:`INPUT_STEPS`.
    """

    codes: Tensor
    scales: Tensor
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    input_steps: float = INPUT_STEPS[0]

    @property
    def coding(self) -> Coding:
        """The meaning of the codes."""
        return int8_coding(static=self.input_scale is not None)

    def dequantize(self) -> Tensor:
        """Each integer times its scale, float32 ``[out_features, in_features]``."""
        return self.codes * self.scales

    def rows(self, start: int, end: int) -> Int8Weight:
        """The part of some output rows."""
        return replace(self, codes=self.codes[start:end], scales=self.scales[start:end])

    def put_into(self, layer: TargetLayer) -> None:
        """Write the weight into the layer, and store these codes with its module."""
        layer.weight.copy_(self.dequantize())
        layer.notes["quantized_weight"] = self

    def report(self, layer: TargetLayer) -> LayerReport:
        """Bits of the integers, and of the scales."""
        return LayerReport.of(layer, bits=8.0, overhead_bits=32 * self.scales.numel())

    def taken_apart(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Codes and scales, and how inputs are rounded."""
        parts = {"codes": self.codes, "scales": self.scales, "input_scale": self.input_scale}
        parts |= {"input_zero": self.input_zero}
        return {name: part for name, part in parts.items() if part is not None}, {"input_steps": self.input_steps}

    @classmethod
    def put_together(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Int8Weight:
        """The inverse of :meth:`taken_apart`."""
        return cls(**tensors, input_steps=settings["input_steps"])


def check_input_steps(steps: float) -> None:
    """Refuse a number of steps that no program rounds inputs to.

    Raises:
        BadInput: it is not one of :data:`INPUT_STEPS`.
    """
    if steps not in INPUT_STEPS:
        raise BadInput(
            f"compression.input_steps={steps:g} is not 127 (SmoothQuant, vLLM) or 127.5 (compressed-tensors in "
            "transformers), the steps from zero to a token's largest input"
        )


def int8_coding(*, static: bool) -> Coding:
    """The meaning of such codes.

    Args:
        static: whether the range of the inputs is fixed.
    """
    return Coding(INT8, 8, (1, None), activations=True, static=static)
