"""The loss of a decoder whose vocabulary head is frozen, without the logits of a whole batch.

The logits of a batch and their gradients are the largest tensors of a training by far: a vocabulary of 49,152 needs 400
MB for 2,048 tokens in float32, several times over. If the head is frozen, only its input needs a gradient, which is
known as soon as a token's logits are. So a few tokens are finished at a time, and their logits are never stored.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from knowledge_compression.models.bodies import body_of, head_over, without_adapters

_LOGITS = 1 << 23  # computed by one product
_IN_CACHE = 1 << 18  # turned into probabilities at a time on a CPU
_LARGE = 100.0  # logits with which a head is tried; capping and scaling change them
_IS_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # by head


class _Read(Exception):
    """Ends a forward pass before the head."""


def plain_head(network: nn.Module) -> nn.Linear | None:
    """The frozen linear layer whose outputs are a decoder's logits as they are; None if there is no such layer.

    Whether the network scales or caps its logits is found by trying large ones, once.
    """
    inner = without_adapters(network)
    head = inner.get_output_embeddings() if isinstance(inner, PreTrainedModel) else None
    if type(head) is not nn.Linear or head.weight.requires_grad or "forward" in vars(head) or head._forward_hooks:
        return None
    if head not in _IS_PLAIN:
        _IS_PLAIN[head] = _outputs_are_logits(inner, head)
    return head if _IS_PLAIN[head] else None


def _outputs_are_logits(inner: Any, head: nn.Linear) -> bool:
    weight = head.weight
    states = torch.linspace(-1, 1, head.in_features).sin().to(weight)[None, None]  # draws no random numbers
    with torch.no_grad():
        states = states * (_LARGE / head(states).abs().amax().clamp_min(1e-6))

    generators = [weight.device] if weight.device.type == "cuda" else []  # dropout draws from them
    with torch.no_grad(), torch.random.fork_rng(generators), head_over(inner, states):
        ids = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
        found = inner(input_ids=ids, use_cache=False).logits
        return torch.equal(found.float(), head(states).float())


def head_inputs(network: nn.Module, ids: Tensor) -> Tensor:
    """What the head of a decoder would read, ``[batch, length, hidden]``; the head itself is not computed.

    Args:
        network: a decoder with its head; peft may be wrapped around it.
        ids: token ids ``[batch, length]``; positions of a soft prompt before them are left out.
    """
    found: list[Tensor] = []

    def stop(_body: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output[0])
        raise _Read

    handle = body_of(without_adapters(network)).register_forward_hook(stop)
    try:
        network(input_ids=ids, use_cache=False)
    except _Read:
        pass
    finally:
        handle.remove()
    return found[0][:, -ids.shape[1] :]


def summed_loss(states: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The summed negative log-likelihood of some tokens in nats, a float32 scalar whose gradient reaches ``states``.

    Products are computed in autocast's dtype if it is enabled, otherwise in that of the weights; log-probabilities are
    float32.

    Args:
        states: the head's input, ``[tokens, hidden]``.
        head: a frozen linear layer.
        labels: int64 ``[tokens]``.
    """
    place = states.device.type
    dtype = torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else head.weight.dtype
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(place, enabled=False):
        return cast("Tensor", _Loss.apply(states, weight, bias, labels))


class _Loss(torch.autograd.Function):
    """The loss, and the gradient of its input, which is computed along the way."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        total = torch.zeros((), device=states.device)
        gradient = torch.empty(states.shape, dtype=weight.dtype, device=states.device)
        rows = max(1, _LOGITS // len(weight))
        for part, wanted, out in zip(states.split(rows), labels.split(rows), gradient.split(rows), strict=True):
            logits = functional.linear(part.to(weight.dtype), weight, bias)
            total += _into_gradient(logits, wanted)
            if ctx.needs_input_grad[0]:
                torch.mm(logits, weight, out=out)
        ctx.save_for_backward(gradient)
        ctx.dtype = states.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *of_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.to(ctx.dtype) * of_loss[0], None, None, None


def _into_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Replace logits ``[tokens, vocabulary]`` by the gradient of their summed loss, and return the loss.

    On a CPU a few rows at a time, which stay in cache from the first step to the last.
    """
    rows = max(1, _IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    total = torch.zeros((), device=logits.device)
    for part, wanted in zip(logits.split(rows), labels.split(rows), strict=True):
        log_probs = torch.log_softmax(part.float(), -1)
        total -= log_probs.gather(1, wanted[:, None]).sum()
        gradient = log_probs.exp_()
        gradient[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
        part.copy_(gradient)
    return total
