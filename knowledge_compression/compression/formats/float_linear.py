"""A linear layer whose weights are small floats and whose inputs are rounded to such numbers at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from knowledge_compression.compression.solve.floats import FloatWeight, rounded_tokens
from knowledge_compression.models.device import torch_dtype
from knowledge_compression.models.replaced import ReplacedLinear


class FloatLinear(ReplacedLinear):
    """``y = round(x) W^T + b`` with the interface of ``nn.Linear``.

    Inputs are rounded in float32, with scales from each token alone: FP8 one per token (one per run of inputs where the
    weight has square blocks), MXFP4 and NVFP4 one per block as in the weight. The rounded numbers are then multiplied
    in the inputs' own dtype. Gradients pass as if inputs were not rounded (straight through).

    Args:
        weight: the codes.
        bias: ``[out_features]`` or None; the same object is kept, so that a tied bias stays tied.
        dtype: the dtype in which the weights are multiplied.

    Attributes:
        codes, scales, whole: buffers, see :class:`~knowledge_compression.compression.solve.floats.FloatWeight`.
        multiplied: buffer ``[out_features, in_features]``, the weight that the codes represent.
    """

    codes: Tensor
    scales: Tensor
    whole: Tensor
    multiplied: Tensor

    def __init__(self, weight: FloatWeight, bias: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias, self.dtype = bias, dtype
        self.kind, self.block, self.to_even = weight.kind, weight.block, weight.to_even
        self.bits = float(weight.coding.bits)
        self.out_features, self.in_features = weight.codes.shape
        for name, tensor in weight.taken_apart()[0].items():
            self.register_buffer(name, tensor)
        self.register_buffer("multiplied", weight.dequantize().to(dtype))

    @property
    def coded(self) -> FloatWeight:
        """The codes of the weight, on the CPU."""
        codes, scales, whole = (tensor.cpu() for tensor in (self.codes, self.scales, self.whole))
        return FloatWeight(self.kind, self.block, codes, scales, whole, activations=True, to_even=self.to_even)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes represent, ``[out_features, in_features]``."""
        return self.multiplied.clone()

    @property
    def overhead_bits(self) -> int:
        """Bits for the scales."""
        return self.coded.overhead_bits

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of this layer, without its buffers and its bias, JSON-ready."""
        settings = {"kind": self.kind, "block": list(self.block), "to_even": self.to_even}
        return settings | {"dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_buffers(cls, buffers: Mapping[str, Tensor], bias: Any, **settings: Any) -> Self:
        """Rebuild a layer from its buffers, its bias and its :attr:`settings`."""
        parts = {name: tensor.cpu() for name, tensor in buffers.items() if name != "multiplied"}
        weight = FloatWeight.put_together(parts, settings | {"activations": True})
        return cls(weight, bias, torch_dtype(settings["dtype"])).to(buffers["codes"].device)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``, in the input's floating dtype."""
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return nn.functional.linear(_Rounded.apply(inputs, self), self.multiplied.to(inputs.dtype), bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.kind}"


class _Rounded(torch.autograd.Function):
    """Forward, the rounded inputs; backward, the gradient as if they were not rounded."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: FloatLinear) -> Tensor:
        rounded = rounded_tokens(inputs.float(), layer.kind, layer.block, to_even=layer.to_even)
        return rounded.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
