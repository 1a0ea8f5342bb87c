"""A network without what is around it: peft's wrapper, and the vocabulary head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from knowledge_compression.models.families import ENCODER, architecture_of

if TYPE_CHECKING:
    from torch import Tensor, nn


def without_adapters(network: nn.Module) -> Any:
    """The network inside peft's wrapper, or the network itself without one."""
    unwrap = getattr(network, "get_base_model", None)  # a method of peft's wrapper
    return unwrap() if callable(unwrap) else network


def body_of(inner: Any) -> nn.Module:
    """The part before the head, of a network without a wrapper: the encoder of an encoder, otherwise the decoder."""
    architecture = architecture_of(inner)
    if architecture.family == ENCODER:
        whole: nn.Module = inner.base_model
        return whole
    around: nn.Module = inner.get_submodule(architecture.stacks[-1].blocks.rpartition(".")[0])
    body: nn.Module = inner.get_decoder()
    # Llama 4's is the network with its head, and that of ModernBERT's decoder the projection to the vocabulary.
    return body if body is not inner and around in body.modules() else around


@contextmanager
def head_over(network: nn.Module, states: Tensor) -> Iterator[None]:
    """Let the vocabulary head read these states, ``[1, chosen, hidden]``, in a pass over any input.

    The states are what the head of the same network reads in some other pass; the logits are then those of that pass.
    """

    def replace(_body: nn.Module, _inputs: Any, output: Any) -> Any:
        output["last_hidden_state"] = states
        return output

    handle = body_of(without_adapters(network)).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
