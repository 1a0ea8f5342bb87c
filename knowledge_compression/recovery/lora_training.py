"""A linear layer with a low-rank addition, trained in fewer passes over its inputs and outputs than peft's own."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional


class LoraLinear(PeftLinear):
    """peft's layer, with a product of its own for training.

    peft computes the addition, its scaling and the sum one by one, and autograd keeps and casts the tensors of each.
    Here products add to their result, and the input is cast once. The values differ by rounding. Whatever is not a
    plain linear layer with one plain addition is left to peft, and so is every pass without gradients.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for ``[..., in_features]``."""
        dtype = self._trains_in(x) if not (args or kwargs) and torch.is_grad_enabled() else None
        if dtype is None:
            return super().forward(x, *args, **kwargs)
        base, name = self.base_layer, self.active_adapters[0]
        weight, bias = base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        with torch.autocast(x.device.type, enabled=False):
            rows = cast("Tensor", _Sum.apply(x, weight, bias, down, up, self.scaling[name]))
        return rows.view(*x.shape[:-1], -1)  # here, as a network may add to it in place (Llama 4 to its shared expert)

    def _trains_in(self, x: Tensor) -> torch.dtype | None:
        """The dtype of the products; None if they are left to peft."""
        base, names = self.base_layer, self.active_adapters
        if (
            not self.training
            or self.disable_adapters
            or self.merged
            or len(names) != 1
            or names[0] in self.lora_variant
        ):
            return None
        if type(base) is not nn.Linear or "forward" in vars(base) or base._forward_hooks or base._forward_pre_hooks:
            return None
        if names[0] not in self.lora_A or base.weight.requires_grad or self.lora_B[names[0]].bias is not None:
            return None
        if not isinstance(self.lora_dropout[names[0]], nn.Identity):
            return None
        place, stored = x.device.type, base.weight.dtype
        if torch.is_autocast_enabled(place) and stored in (torch.float32, torch.get_autocast_dtype(place)):
            return torch.get_autocast_dtype(place)
        return stored if x.dtype == stored and not torch.is_autocast_enabled(place) else None


class _Sum(torch.autograd.Function):
    """Rows of ``x @ weight.T + bias + scaling * (x @ down.T) @ up.T``; the frozen weight and bias get no gradient."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, bias, down, up, scaling = given
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        narrow_down, narrow_up = down.to(weight.dtype), up.to(weight.dtype)
        hidden = rows @ narrow_down.T
        output = functional.linear(rows, weight, bias).addmm_(hidden, narrow_up.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, narrow_down, narrow_up, hidden)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, x.shape, (x.dtype, down.dtype, up.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, *of_output: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, hidden = ctx.saved_tensors
        of_x, of_down, of_up = ctx.dtypes
        gradient = of_output[0].reshape(-1, weight.shape[0]).to(weight.dtype)
        of_hidden = (gradient @ up) * ctx.scaling
        of_rows = None
        if ctx.needs_input_grad[0]:
            of_rows = (gradient @ weight).addmm_(of_hidden, down).to(of_x).view(ctx.shape)
        more = ((of_hidden.T @ rows).to(of_down), (gradient.T @ hidden).to(of_up) * ctx.scaling)
        return of_rows, None, None, *more, None
