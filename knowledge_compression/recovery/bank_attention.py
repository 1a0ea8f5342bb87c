"""Attention together with the log-sum-exp of its scores, by PyTorch's fused kernels.

With the log-sum-exp, attention to the union of two sets of keys follows exactly from the attention to each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowledge_compression.heavy import functional, torch

if TYPE_CHECKING:
    from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention with its log-sum-exp.

    Args:
        query: ``[rows, heads, queries, width]``.
        key, value: ``[rows, key heads, keys, width]``; each key head serves ``heads / key heads`` consecutive heads.
        scale: factor on the dot products.
        bias: added to the scaled dot products, broadcastable to ``[rows, heads, queries, keys]``, or None.
        causal: query i sees only keys 0..i; not allowed together with a bias.

    Returns:
        The attended values ``[rows, heads, queries, width]`` and the natural log of the sum of the exponentiated scores
        ``[rows, heads, queries]`` in float32.
    """
    kernel = _KERNELS.get(query.device.type, attend_plainly)
    # Under autocast their dtypes can differ, and autocast does not cast the arguments of these kernels.
    key, value = key.to(query.dtype), value.to(query.dtype)
    bias = None if bias is None else bias.to(query.dtype)
    return kernel(query, key, value, scale=scale, bias=bias, causal=causal)


def attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """The same as :func:`attend`, computed from the definition, on any device and with gradients."""
    key, value = _every_head(key, query), _every_head(value, query)
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def _attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)


def _attend_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    key, value = _every_head(key, query), _every_head(value, query)
    if bias is not None:  # the kernel needs rows of the bias to start at multiples of 16 elements
        keys = key.shape[2]
        bias = functional.pad(bias.expand(*query.shape[:3], keys), (0, -keys % 16))[..., :keys]
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    attended, sums, *_ = fused(query, key, value, bias, True, 0.0, causal, scale=scale)
    return attended, sums[..., : query.shape[2]]  # the kernel pads the queries


_KERNELS = {"cpu": _attend_on_cpu, "cuda": _attend_on_cuda}


def _every_head(states: Tensor, query: Tensor) -> Tensor:
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)
