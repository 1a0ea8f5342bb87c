"""The vocabulary projection, computed only at positions where a log-probability is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from knowledge_compression.heavy import torch
from knowledge_compression.models.bodies import body_of, without_adapters
from knowledge_compression.models.families import architecture_of

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def head_at(
    network: nn.Module, rows: Tensor, positions: Tensor, width: int, *, early: bool = True
) -> Iterator[list[Tensor]]:
    """Restrict the vocabulary head to chosen positions, so that the logits are ``[1, chosen, vocabulary]``.

    The head comes after the body (or the decoder) in every network, so a hook on the body's output serves all of them,
    including networks with replaced layers, and leaves scaling and capping of logits to the network itself. If the last
    block ends in a pointwise part (encoders that normalise last), the other positions are dropped before that part.

    Args:
        network: a network with its head; adapters may be wrapped around it.
        rows, positions: which row and which of its tokens, int64 ``[chosen]`` each.
        early: drop the other positions before the last block's pointwise part, if it has one; not possible with a
            prompt that is cut off the body's output.
        width: tokens in a row of input ids; what the body outputs beyond it belongs to soft prompts before the input.

    Yields:
        A list that holds the head's input ``[1, chosen, hidden]`` after a forward pass.
    """
    read: list[Tensor] = []

    def chosen(hidden: Tensor) -> Tensor:
        device = hidden.device  # differs from the input's device if the network is divided
        return hidden[rows.to(device), positions.to(device) + (hidden.shape[1] - width)][None]

    def narrow_inputs(_part: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(map(chosen, inputs))

    inner = without_adapters(network)
    architecture = architecture_of(inner)
    narrows_early = early and architecture.pointwise_from is not None

    def narrow_output(_body: nn.Module, _inputs: Any, output: Any) -> Any:
        if not narrows_early:
            output["last_hidden_state"] = chosen(output[0])
        read.append(output[0])
        return output

    with ExitStack() as hooks:
        if narrows_early:
            *_, last_block = inner.get_submodule(architecture.stacks[-1].blocks).children()
            part = last_block.get_submodule(architecture.pointwise_from)
            hooks.callback(part.register_forward_pre_hook(narrow_inputs).remove)
        hooks.callback(body_of(inner).register_forward_hook(narrow_output).remove)
        yield read


def likeliest(logits: Tensor) -> Tensor:
    """``logits.argmax(-1)`` of ``[rows, vocabulary]``, the first among equals: int64 ``[rows]``.

    It takes two steps, the best block of tokens and then the best token in it, because a CPU finds maxima much faster
    than their indices.
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


def read_off(
    logits: Tensor, of_read: NDArray[np.int64], targets: NDArray[np.int64], at_a_time: int
) -> tuple[Tensor, Tensor]:
    """The log-probability of each target, and whether it is the most likely token, ``[reads]`` each.

    Args:
        logits: ``[positions, vocabulary]``.
        of_read: for each read, its row in ``logits``.
        targets: for each read, the token whose log-probability is computed.
        at_a_time: number of rows of logits to process at a time.
    """
    rows, wanted = (torch.from_numpy(array).to(logits.device) for array in (of_read, targets))
    sums, best = (torch.cat(column) for column in zip(*map(_log_sums, logits.split(at_a_time)), strict=True))
    return logits[rows, wanted].float() - sums[rows], best[rows] == wanted


def _log_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row, float32 ``[rows]``, and its most likely token, int64 ``[rows]``.

    The sum is computed from ``log_softmax``, which on a CPU processes a row while it is in cache, unlike ``logsumexp``.
    """
    best = likeliest(logits)
    at = best[:, None]
    log_probs = torch.log_softmax(logits.float(), -1)
    return (logits.gather(1, at).float() - log_probs.gather(1, at))[:, 0], best
