"""The vocabulary projection, and what comes before it, only where a log-probability is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from knowledge_compression.models.families import ENCODER, architecture_of


@contextmanager
def head_at(network: nn.Module, rows: Tensor, positions: Tensor, width: int, *, early: bool = True) -> Iterator[None]:
    """Let the vocabulary head see only chosen positions, so that the logits are ``[1, chosen, vocabulary]``.

    The head comes after the body (or the decoder) in every network, so a hook on the body's output serves all of them,
    with whatever was put in the place of their layers, and leaves scalings and caps of logits to the network itself.
    Where the last block ends in a part that treats each position by itself (encoders that norm last), the other
    positions are let go before that part.

    Args:
        network: a network with its head; adapters may be wrapped around it.
        rows, positions: which row and which of its tokens, int64 ``[chosen]`` each.
        early: let the other positions go before the last block's pointwise part, where it has one; not behind a prompt
            that is cut off the body's output.
        width: tokens in a row of input ids; what the body gives beyond it are soft prompts in front of the input.
    """

    def chosen(hidden: Tensor) -> Tensor:
        return hidden[rows, positions + (hidden.shape[1] - width)][None]

    def narrow_inputs(_part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(map(chosen, inputs))

    def narrow_output(_body: nn.Module, _inputs: Any, output: Any) -> Any:
        output["last_hidden_state"] = chosen(output[0])
        return output

    inner = without_adapters(network)
    architecture = architecture_of(inner)
    if early and architecture.pointwise_from is not None:
        *_, last_block = inner.get_submodule(architecture.stacks[-1].blocks).children()
        part = last_block.get_submodule(architecture.pointwise_from)
        handle = part.register_forward_pre_hook(narrow_inputs)
    else:
        body: nn.Module = inner.base_model if architecture.family == ENCODER else inner.get_decoder()
        if body is inner:  # as Llama 4's says of itself: the blocks' own parent gives the hidden states
            body = inner.get_submodule(architecture.stacks[-1].blocks.rpartition(".")[0])
        handle = body.register_forward_hook(narrow_output)
    try:
        yield
    finally:
        handle.remove()


def likeliest(logits: Tensor) -> Tensor:
    """``logits.argmax(-1)`` of ``[rows, vocabulary]``, the first of equals: int64 ``[rows]``.

    In two steps, the best block of tokens and the best in it, because a CPU finds maxima many times faster than places.
    """
    vocabulary = logits.shape[-1]
    width = isqrt(vocabulary)
    whole = vocabulary - vocabulary % width
    peaks = logits[:, :whole].unflatten(1, (-1, width)).amax(2)
    if whole < vocabulary:
        peaks = torch.cat([peaks, logits[:, whole:].amax(1, keepdim=True)], 1)
    tokens = peaks.argmax(1, keepdim=True) * width + torch.arange(width, device=logits.device)
    tokens = tokens.clamp_max(vocabulary - 1)
    return tokens.gather(1, logits.gather(1, tokens).argmax(1, keepdim=True))[:, 0]


def without_adapters(network: nn.Module) -> Any:
    """The network under peft's wrapper, or itself where there is none."""
    unwrap = getattr(network, "get_base_model", None)  # of peft's wrapper
    return unwrap() if callable(unwrap) else network
