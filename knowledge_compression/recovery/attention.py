"""Attention of an input to itself and to cached prompts, as an attention function of transformers.

Each part is computed by PyTorch's fused kernel together with its log-sum-exp; the parts are then put together exactly,
so no mask over prompts and input is ever made and the causal kernel stays in use. The log-sum-exp of a part is also all
that Inference-time Dynamic Prompting needs to see how much attention the input pays to each prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from knowledge_compression.recovery.prompted import Reading

PROMPTED = "prompted"  # the name under which transformers finds the attention function below


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention with its log-sum-exp.

    Args:
        query: ``[rows, heads, queries, width]``.
        key, value: ``[rows, key heads, keys, width]``; each key head serves ``heads / key heads`` consecutive heads.
        scale: factor on the dot products.
        bias: added to the scaled dot products, broadcastable to ``[rows, heads, queries, keys]``, or None.
        causal: query i sees keys 0..i only; then there is no bias.

    Returns:
        The attended values ``[rows, heads, queries, width]`` and the natural log of the sum of the exponentiated scores
        ``[rows, heads, queries]`` in float32.
    """
    kernel = _KERNELS.get(query.device.type, attend_plainly)
    return kernel(query, key, value, scale=scale, bias=bias, causal=causal)


def attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """The same as :func:`attend` by the definition, on any device and with gradients."""
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
    if bias is not None:  # the kernel wants rows of the bias to start at multiples of 16 elements
        keys = key.shape[2]
        bias = functional.pad(bias.expand(*query.shape[:3], keys), (0, -keys % 16))[..., :keys]
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    attended, sums, *_ = fused(query, key, value, bias, True, 0.0, causal, scale=scale)
    return attended, sums[..., : query.shape[2]]  # the kernel pads the queries


_KERNELS = {"cpu": _attend_on_cpu, "cuda": _attend_on_cuda}


def _every_head(states: Tensor, query: Tensor) -> Tensor:
    return states.repeat_interleave(query.shape[1] // states.shape[1], dim=1)


def prompted_attention(  # noqa: PLR0917 - transformers passes these by position
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    reading: Reading | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface in which every token also sees the cached prompt that its row chose.

    Args:
        module: the attention module; its ``layer_idx`` says which of the cached keys and values are its own.
        query, key, value: as :func:`attend` takes them, rotated where the architecture rotates them.
        attention_mask: None (causal), or what may be seen as booleans or as additive floats; prompts are not in it.
        scaling: factor on the dot products; ``width ** -0.5`` where it is None.
        reading: the forward pass in which this happens; without it, transformers' own attention answers.
        **kwargs: what other attention functions take; handed on where ``reading`` is None.

    Returns:
        ``[rows, queries, heads, width]``, and None in the place of attention weights.
    """
    if reading is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = attention_mask is None and query.shape[2] > 1
    own, own_sum = attend(query, key, value, scale=scale, bias=_additive(attention_mask, query), causal=causal)
    prompt, prompt_sum = reading.attend_to_prompt(int(module.layer_idx), query, own_sum, scale)  # type: ignore[arg-type]
    share = torch.sigmoid(prompt_sum - own_sum)[..., None].to(own.dtype)
    return torch.lerp(own, prompt, share).transpose(1, 2).contiguous(), None


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, -torch.inf)


AttentionInterface.register(PROMPTED, prompted_attention)
AttentionMaskInterface.register(PROMPTED, sdpa_mask)
