"""Float32 products of a scoring pass by oneDNN, on processors where that is the faster of PyTorch's two libraries.

PyTorch multiplies float32 matrices on a CPU with MKL, whose best kernels are for Intel processors. On AMD processors
with AVX512, oneDNN, which PyTorch also includes, is faster (docs/performance.md); results differ by float32 rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from knowledge_compression.models.device import Device
from knowledge_compression.models.spread import main_device

_SLOT = "_old_forward"  # accelerate's name for the forward that it calls once a layer's weights are loaded
_NARROWEST = 256  # input features; below this a call costs more than the product


def linears_for_onednn(network: nn.Module) -> list[nn.Linear]:
    """The plain linear layers of a network that oneDNN multiplies faster; none on other devices and processors."""
    if not Device.of(torch.device("cpu")).onednn_products:
        return []
    return [module for module in network.modules() if type(module) is nn.Linear and _suits(module)]


def _suits(linear: nn.Linear) -> bool:
    weight = linear.weight
    is_plain = weight.layout == torch.strided and weight.is_contiguous()
    if "forward" in vars(linear):  # part of a divided network that computes here, or another program's module
        on_cpu = _SLOT in vars(linear) and main_device(linear).type == "cpu"
    else:
        on_cpu = weight.device.type == "cpu"
    return is_plain and on_cpu and weight.dtype == torch.float32 and weight.shape[1] >= _NARROWEST


def _slot(linear: nn.Linear) -> str:
    return _SLOT if _SLOT in vars(linear) else "forward"


@contextmanager
def multiplied_by_onednn(linears: Sequence[nn.Linear]) -> Iterator[None]:
    """Use oneDNN for these layers' products, without gradients, until the end of the context."""
    for linear in linears:
        setattr(linear, _slot(linear), partial(onednn_product, linear))
    try:
        yield
    finally:
        for linear in linears:
            if _slot(linear) == _SLOT:
                setattr(linear, _SLOT, partial(nn.Linear.forward, linear))
            else:
                del linear.forward


def onednn_product(linear: nn.Linear, states: Tensor) -> Tensor:
    """The layer's output for ``[..., in_features]`` on a CPU; dtypes other than float32 use the layer's own forward."""
    if states.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return nn.Linear.forward(linear, states)
    return onednn_linear(states, linear.weight, linear.bias)


def onednn_linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` of float32 on a CPU, without gradients."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return product
