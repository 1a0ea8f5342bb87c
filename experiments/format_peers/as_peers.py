"""What peers do to the inputs of a layer, done to a network of this program, so that only their own part is left."""

from __future__ import annotations

from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from knowledge_compression.compression.formats.int8_linear import Int8Linear
from knowledge_compression.compression.formats.int8_variants import StaticInt8Linear

SHORT, LONG = 32, 256  # inputs that share a scale in llama.cpp: Q8_0; Q8_K, which it takes for weights in blocks of 256


def with_sums_of_floats(network: nn.Module) -> None:
    """Let int8 layers multiply as compressed-tensors does: the same codes, made floats before the product.

    This program adds up whole numbers, which is exact. A fixed range's zero point is added before rounding there.
    """
    for module in network.modules():
        if isinstance(module, Int8Linear):
            module.forward = _product_of_floats.__get__(module)  # type: ignore[method-assign]


def _product_of_floats(layer: Int8Linear, inputs: Tensor) -> Tensor:
    rows = inputs.reshape(-1, layer.in_features).float()
    if isinstance(layer, StaticInt8Linear):
        scale, zero = layer.input_scale, layer.input_zero - 64  # in files, 7 bits are -64 to 63
        codes = (rows / scale + zero).round().clamp(-64, 63) - zero
    else:
        integers, scale, _ = layer.round_inputs(rows)
        codes = integers.float()
    product = nn.functional.linear(codes * scale, layer.weight.float(), layer.bias)
    return product.to(inputs.dtype).view(*inputs.shape[:-1], layer.out_features)


def as_llama_cpp(network: nn.Module) -> None:
    """Let Gemma 3n's sparse layers divide the sum of squares by n - 1 instead of n, and take GELU from a table, as
    llama.cpp does: few inputs pass the threshold, so that the norm behind them enlarges any rounding.
    """
    for module in network.modules():
        if type(module).__name__.startswith("Gemma3n") and hasattr(module, "act_fn"):
            module.act_fn = _Table()
        if getattr(module, "activation_sparsity", 0.0) > 0:
            module._gaussian_topk = partial(_largest, NormalDist().inv_cdf(module.activation_sparsity))


class _Table(nn.Module):
    """GELU by tanh of inputs of 16 bits, rounded to 16 bits, between -10 and 10."""

    def forward(self, inputs: Tensor) -> Tensor:
        values = nn.functional.gelu(inputs.half().float(), approximate="tanh").half().float()
        return torch.where(inputs <= -10, 0.0, torch.where(inputs >= 10, inputs, values))


def _largest(threshold: float, inputs: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(inputs, dim=-1, keepdim=True)
    return (inputs - mean - threshold * deviation).relu()


def with_inputs_of_8_bits(network: nn.Module) -> None:
    """Let the blocks' layers round their inputs to 8 bits in blocks, as llama.cpp does before a quantized weight."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(_rounded)


def _rounded(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    (inputs,) = given
    length = LONG if inputs.shape[-1] % LONG == 0 else SHORT
    blocks = inputs.float().unflatten(-1, (-1, length))
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    codes = (blocks / step).round()
    return ((codes * (step.half().float() if length == SHORT else step)).flatten(-2).to(inputs.dtype),)
