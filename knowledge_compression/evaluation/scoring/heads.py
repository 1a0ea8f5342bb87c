"""The vocabulary projection only where a log-probability is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from knowledge_compression.models.families import ENCODER, architecture_of


@contextmanager
def head_at(network: nn.Module, rows: Tensor, positions: Tensor, width: int) -> Iterator[None]:
    """Let the vocabulary head see only chosen positions, so that the logits are ``[1, chosen, vocabulary]``.

    The head comes after the body (or the decoder) in every network, so a hook on the body's output serves all of them,
    with whatever was put in the place of their layers, and leaves scalings and caps of logits to the network itself.

    Args:
        network: a network with its head; adapters may be wrapped around it.
        rows, positions: which row and which of its tokens, int64 ``[chosen]`` each.
        width: tokens in a row of input ids; what the body gives beyond it are soft prompts in front of the input.
    """

    def gather(_body: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0]
        output["last_hidden_state"] = hidden[rows, positions + (hidden.shape[1] - width)][None]
        return output

    handle = _body(network).register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def _body(network: nn.Module) -> nn.Module:
    """What the head comes after: the stack of blocks, under any wrapper of adapters."""
    unwrap = getattr(network, "get_base_model", None)  # of peft's wrapper
    inner: Any = unwrap() if callable(unwrap) else network
    return inner.base_model if architecture_of(inner.config).family == ENCODER else inner.get_decoder()
