"""The logit lens: the vocabulary projection after every block (nostalgebraist, 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from knowledge_compression.models.bodies import without_adapters
from knowledge_compression.models.families import architecture_of


@contextmanager
def head_at_every_depth(network: nn.Module, rows: Tensor, positions: Tensor, width: int) -> Iterator[None]:
    """Apply what comes after the blocks to chosen positions as they were before the first block and after each.

    The logits, ``[any, any, vocabulary]``, then begin with those of the first chosen position at every depth, in turn,
    then those of the second, and so on. Everything after the last block (norm, transform, head, scalings) works
    position by position in every network, so it is left to the network itself, including any modules that replaced its
    own: the last block's output is replaced by the states of all depths, packed into the shape that the network
    expects.

    Args:
        network: a network with its head; adapters may be wrapped around it.
        rows, positions: which row and which of its tokens, int64 ``[chosen]`` each.
        width: tokens in a row of input ids; what a block outputs beyond it belongs to soft prompts before the input.
    """
    blocks, uses = _last_stack(network)
    states: list[Tensor] = []

    def chosen(hidden: Tensor) -> Tensor:
        device = hidden.device  # differs from block to block if the network is divided
        return hidden[rows.to(device), positions.to(device) + (hidden.shape[1] - width)]

    def before(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not states:
            states.append(chosen(next(iter((*args, *kwargs.values())))))

    def after(_block: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(chosen(hidden))
        if len(states) <= uses:
            return output
        flat = torch.stack([state.to(hidden.device) for state in states], dim=1).flatten(0, 1)
        padded = functional.pad(flat, (0, 0, 0, -len(flat) % hidden.shape[1]))
        packed = padded.unflatten(0, (-1, hidden.shape[1]))
        return (packed, *output[1:]) if isinstance(output, tuple) else packed

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(after).remove)
        yield


def depths(network: nn.Module) -> int:
    """The number of depths: before the first block, and after each."""
    return 1 + _last_stack(network)[1]


def _last_stack(network: nn.Module) -> tuple[list[nn.Module], int]:
    """The blocks before the head, under any wrapper of adapters, and how often a forward pass uses each."""
    inner = without_adapters(network)
    architecture = architecture_of(inner)
    stack = architecture.stacks[-1]
    blocks = [module for path, module in inner.named_modules() if stack.is_block(path)]
    shared = architecture.shared_depth
    return blocks, getattr(inner.config, shared) if shared else len(blocks)
