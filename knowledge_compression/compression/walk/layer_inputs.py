"""The inputs of chosen layers of a module while it runs, and each token's influence on its output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from knowledge_compression.compression.walk.expert_inputs import ExpertInputs
from knowledge_compression.errors import BadInput
from knowledge_compression.models.targets import TargetLayer


def reading(
    layers: Mapping[str, TargetLayer], run: Callable[[], Any], *, by_influence: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run a module and record the inputs of these layers in it.

    Of a layer that runs more than once (T5Gemma 2 reads text and its encoder's states with the same keys and values),
    these are the inputs of the first time, which are also those that a suspended pass meets.

    Args:
        layers: the layers, by path.
        run: runs the module and returns its output.
        by_influence: whether to measure how far an error at each token moves that output (one backward pass).

    Returns:
        The inputs of each layer, in the order in which they ran, and the influence of each token on each (empty unless
        asked for). An expert that got no token is absent.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def before(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (values := first_tensor(args, kwargs)).numel():
            inputs.setdefault(path, values.detach())

    def seen(path: str, output: Tensor) -> Tensor:
        if path in outputs:
            return output
        # The graph must begin at a leaf; the network gets a copy, which it may modify in place.
        outputs[path] = output if output.requires_grad else output.detach().requires_grad_()
        return output if output.requires_grad else outputs[path].clone()

    def after(path: str, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return seen(path, output)

    experts = [layer for layer in layers.values() if layer.expert]
    with ExitStack() as hooks, torch.set_grad_enabled(by_influence):
        for path, layer in layers.items():
            if layer.expert:
                continue
            hooks.callback(layer.module.register_forward_pre_hook(partial(before, path), with_kwargs=True).remove)
            if by_influence:
                hooks.callback(layer.module.register_forward_hook(partial(after, path)).remove)
        if experts:
            mode = hooks.enter_context(ExpertInputs(experts, seen if by_influence else None))
            result = run()
            inputs |= mode.inputs
        else:
            result = run()
    return inputs, _influence(result, outputs) if outputs else {}


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """A module's input: the first tensor that it is called with."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def finite(path: str, values: Tensor) -> Tensor:
    """Return the values themselves.

    Raises:
        BadInput: some are not finite; the message names ``path``, whose inputs they are.
    """
    # A sum is finite only if all its terms are, and is several times as fast as checking each of them.
    if not (bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())):
        raise BadInput(f"{path} reads values that are not finite on the calibration text; try dtype=float32")
    return values


def sharing(inputs: Mapping[str, Tensor]) -> list[list[str]]:
    """Group the layers that read the very same tensor; all tensors are kept alive, so that no address is reused."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for path, values in inputs.items():
        groups[identified(values)].append(path)
    return list(groups.values())


def identified(values: Tensor) -> tuple[Any, ...]:
    """A key that identifies this tensor among all tensors that are alive."""
    return values.data_ptr(), values.shape, values.stride(), values._version


def _influence(result: Any, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far a small error at each token of each layer's output moves the block's output, relative to that output's
    size.

    With ``J`` the derivative of the block's output, each token of it divided by its root mean square, by a layer's
    output at one token, this is ``‖J‖²``, estimated without bias by the squared gradient of a randomly signed sum
    (Hutchinson's estimator).

    Returns:
        Float32 ``[tokens]`` for each layer.
    """
    hidden: Tensor = result[0] if isinstance(result, tuple) else result
    signs = torch.randint(0, 2, hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden) * 2 - 1
    size = hidden.detach().float().square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()
    gradients = torch.autograd.grad(hidden, list(outputs.values()), (signs / size).to(hidden))
    return {
        path: gradient.float().square().sum(-1).flatten() for path, gradient in zip(outputs, gradients, strict=True)
    }
