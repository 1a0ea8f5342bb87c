"""A linear layer whose weights are stored as 8-bit integers and whose inputs are quantized at run time.

Products of integers are summed exactly, so that every device gives the same result up to the rounding of the scales
(``int8_products.py``). A GPU may skip the zeros of 2:4 weights (``two_of_four.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Self
from weakref import ReferenceType, ref

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from knowledge_compression.compression.formats.granularity import check_granularity
from knowledge_compression.compression.formats.int8_products import (
    integer_product,
    scaled_product,
    suits_scaled_product,
)
from knowledge_compression.compression.formats.two_of_four import (
    WORTH_TRYING,
    SparseProduct,
    can_skip_zeros,
    faster_product,
)
from knowledge_compression.compression.solve.int8 import INPUT_STEPS, Int8Weight
from knowledge_compression.models.device import torch_dtype
from knowledge_compression.models.replaced import ReplacedLinear

_SMALL = torch.finfo(torch.float32).eps  # smallest scale, as in torch's observers


class Int8Linear(ReplacedLinear):
    """``y = x W^T + b`` in 8-bit integers, with the interface of ``nn.Linear``.

    ``per_tensor``: one scale for the weight, and one scale and zero point for the whole input in 7 bits, as
    ``torch.ao.quantization.quantize_dynamic`` does on a CPU (``reduce_range``). ``per_channel``: one scale per output
    and one per input vector (token) in 8 bits, so that a row's result does not depend on its batch.

    Args:
        weight: ``[out_features, in_features]``, floating.
        bias: ``[out_features]`` or None; the same object is kept, so that a tied bias stays tied.
        granularity: ``per_tensor`` or ``per_channel``.
        input_steps: of ``per_channel``, the steps between zero and a token's largest magnitude, 127 or 127.5.

    Attributes:
        weight_int8: buffer ``[out_features, in_features]``, int8.
        weight_scale: buffer ``[1]`` or ``[out_features]``, float32; a weight is its integer times its scale.
        weight_sum: buffer ``[out_features]``, int32, the contribution of an input zero point of one to each output.
    """

    bits = 8.0

    weight_int8: torch.Tensor
    weight_scale: torch.Tensor
    weight_sum: torch.Tensor
    bias: nn.Parameter | None
    _tried: ReferenceType[torch.Tensor] | None = None  # the weight for which _sparse was chosen, or None
    _sparse: SparseProduct | None = None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: nn.Parameter | None,
        granularity: str = "per_channel",
        input_steps: float = INPUT_STEPS[0],
    ) -> None:
        super().__init__()
        check_granularity(granularity)
        self.granularity, self.input_steps = granularity, input_steps
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        integers, scale = quantize_weight(weight, granularity)
        self.register_buffer("weight_int8", integers)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_sum", integers.sum(1, dtype=torch.int32))
        self.bias = bias

    @classmethod
    def of(cls, linear: nn.Module, granularity: str = "per_channel") -> Int8Linear:
        """The int8 twin of an ``nn.Linear`` or of GPT-2's ``Conv1D``."""
        weight, bias = linear.get_parameter("weight").detach(), linear.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return cls(weight.T if isinstance(linear, Conv1D) else weight, bias, granularity)

    @property
    def coded(self) -> Int8Weight | None:
        """The integers, on the CPU; None if the inputs of a whole batch share one scale."""
        if self.granularity != "per_channel":
            return None
        return Int8Weight(self.weight_int8.cpu(), self.weight_scale[:, None].cpu(), input_steps=self.input_steps)

    @property
    def overhead_bits(self) -> int:
        """Bits for the scales."""
        return 32 * self.weight_scale.numel()

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of this layer besides its buffers and its bias, JSON-ready."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"granularity": self.granularity, "dtype": dtype, "input_steps": self.input_steps}

    @classmethod
    def from_buffers(cls, buffers: Mapping[str, torch.Tensor], bias: Any, **settings: Any) -> Self:
        """Rebuild a layer from its buffers, its bias and its :attr:`settings`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.granularity, layer.dtype, layer.bias = settings["granularity"], torch_dtype(settings["dtype"]), bias
        layer.input_steps = settings.get("input_steps", INPUT_STEPS[0])
        layer.out_features, layer.in_features = buffers["weight_int8"].shape
        for name, buffer in buffers.items():
            layer.register_buffer(name, buffer)
        return layer

    @property
    def weight(self) -> torch.Tensor:
        """The weights that the integers represent, ``[out_features, in_features]``, in their original dtype."""
        return (self.weight_int8 * self.weight_scale[:, None]).to(self.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, in the input's floating dtype.

        Gradients pass to the input as if nothing were rounded (straight through); the weights are frozen.
        """
        # Shaped here, as a network may add to it in place (Llama 4 to its shared expert).
        rows: torch.Tensor = _StraightThrough.apply(inputs.reshape(-1, self.in_features), self)
        return rows.view(*inputs.shape[:-1], self.out_features)

    def multiply(self, integers: torch.Tensor) -> torch.Tensor:
        """The exact product of int8 ``[rows, in_features]`` with the weight, int32 ``[rows, out_features]``."""
        weight = self.weight_int8
        known = self._tried is not None and self._tried() is weight  # moving the layer replaces its buffers
        if not known and len(integers) >= WORTH_TRYING:
            dense = partial(integer_product, right=weight)
            self._sparse = faster_product(weight, integers, dense) if can_skip_zeros(weight) else None
            self._tried, known = ref(weight), True
        return self._sparse(integers) if known and self._sparse is not None else integer_product(integers, weight)

    def multiply_scaled(
        self, integers: torch.Tensor, columns: torch.Tensor, zero_point: torch.Tensor | None
    ) -> torch.Tensor:
        """The product of int8 ``[rows, in_features]``, less their zero point, with the weight, times a factor.

        Args:
            integers: the rounded inputs.
            columns: float32 ``[1]`` or ``[out_features]``, the factor of each output.
            zero_point: the integer that stands for an input of zero, int32; None if it is 0.

        Returns:
            float32 ``[rows, out_features]``, to the bit the same on every path.
        """
        if suits_scaled_product(integers):
            return scaled_product(integers, self.weight_int8, columns, zero_point)
        sums = self.multiply(integers)
        if zero_point is not None:
            sums.sub_(zero_point * self.weight_sum)
        return sums.float().mul_(columns)

    def round_inputs(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The integers of float32 inputs ``[rows, in_features]``, with a scale per row or one scale and zero point."""
        if self.granularity == "per_tensor":
            return quantize_tensor(rows)
        return *quantize_tokens(rows, self.input_steps), None

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.granularity}"


class _StraightThrough(torch.autograd.Function):
    """Forward, the integer product with rows; backward, the gradient of the product with the rounded weights."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
        ctx.layer = layer
        rows = inputs.float()
        integers, scale, zero_point = layer.round_inputs(rows)
        if zero_point is not None:  # one scale for all rows
            outputs = layer.multiply_scaled(integers, layer.weight_scale * scale, zero_point)
            if layer.bias is not None:
                outputs += layer.bias.float()
        else:  # one for each, applied to the finished sums, so that a row's result does not depend on the others
            outputs = layer.multiply_scaled(integers, layer.weight_scale, None)
            if layer.bias is None:
                outputs *= scale
            else:
                torch.addcmul(layer.bias.float(), outputs, scale, out=outputs)
        return outputs.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def quantize_weight(weight: torch.Tensor, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 of a weight ``[out, in]``, and its scale, ``[1]`` or ``[out]``; zeros stay zero.

    The scale is the largest magnitude over 127.5, as in torch's symmetric observers. As in torch, weights are
    multiplied by its reciprocal; a division would round some ties differently.
    """
    values = weight.float()
    largest = values.abs().amax(1) if granularity == "per_channel" else values.abs().amax()[None]
    scale = (largest / 127.5).clamp_min(_SMALL)
    return (values * scale.reciprocal()[:, None]).round_().clamp_(-128, 127).to(torch.int8), scale


def quantize_tokens(rows: torch.Tensor, steps: float = INPUT_STEPS[0]) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 of ``[rows, features]`` with one scale per row, and the scales ``[rows, 1]``.

    A scale is the largest magnitude over ``steps``: 127 as Xiao et al. 2023 ("SmoothQuant") and vLLM's kernels have it;
    127.5, with what exceeds 127 clipped and a division, as compressed-tensors 0.20 does.
    """
    largest = torch.maximum(rows.amax(1, keepdim=True), rows.amin(1, keepdim=True).neg_())  # a copy less than by abs()
    scale = largest.div_(steps).clamp_min_(_SMALL)
    if steps == INPUT_STEPS[0]:
        return (rows * scale.reciprocal()).round_().to(torch.int8), scale
    return (rows / scale).round_().clamp_(-128, 127).to(torch.int8), scale


def quantize_tensor(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The integers 0 to 127, with one scale and one zero point for all of ``rows``.

    The range always includes zero, and zero is exactly representable.
    """
    if not rows.numel():
        return rows.to(torch.int8), rows.new_ones(()), rows.new_zeros((), dtype=torch.int32)
    least, most = torch.aminmax(rows)
    least, most = least.clamp_max(0), most.clamp_min(0)
    scale = (most - least) / 127
    scale = torch.where(scale == 0, 0.1, scale)
    zero_point = (-least / scale).round().clamp(0, 127)
    integers = (rows * scale.reciprocal()).add_(zero_point).round_().clamp_(0, 127)
    return integers.to(torch.int8), scale, zero_point.to(torch.int32)
