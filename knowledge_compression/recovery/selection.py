"""Attention of a decoder with cached prompts before its input, as an attention function for transformers.

Attention to the input and attention to a prompt are computed separately and combined exactly. So no mask over prompts
and input is needed, and the causal kernel can be used. Their log-sum-exps also give Inference-time Dynamic Prompting
the attention that the input pays to each prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from knowledge_compression.heavy import torch
from knowledge_compression.recovery.bank import PromptBank
from knowledge_compression.recovery.bank_attention import attend

if TYPE_CHECKING:
    from torch import Tensor, nn

PROMPTED = "prompted"  # the name under which the attention function below is registered with transformers
PER_LAYER, ONCE = "per_layer", "once"
SELECTIONS = (PER_LAYER, ONCE)


@dataclass
class Reading:
    """One pass of a network over some rows: which prompt each row uses in each layer.

    Attributes:
        bank: the prompts.
        selection: ``per_layer`` or ``once``.
        context: float ``[rows, tokens]``, 1 for the input tokens whose attention selects; None once all layers have
            selected.
        choices: for each layer, the index of each row's prompt, ``[rows]``; filled layer by layer.
    """

    bank: PromptBank
    selection: str
    context: Tensor | None
    choices: dict[int, Tensor] = field(default_factory=dict)

    def attend_to_prompt(self, layer: int, query: Tensor, own_sum: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attend to the prompt that each row uses in this layer, after selecting it if necessary.

        Args:
            layer: index of the layer.
            query: ``[rows, heads, tokens, width]``.
            own_sum: log-sum-exp of the scores of the input with itself, ``[rows, heads, tokens]``.
            scale: factor on the dot products.

        Returns:
            Attended prompt values ``[rows, heads, tokens, width]`` and their log-sum-exp ``[rows, heads, tokens]``.
        """
        known = self.choices.get(0 if self.selection == ONCE else layer)
        # In a network divided over devices, this layer's may be another than that of the bank or of the first choice.
        of_layer = self.bank.keys[layer], self.bank.values[layer], self.bank.bias
        keys, values, bias = (part.to(query.device) for part in of_layer)
        if known is not None:
            known = known.to(query.device)
            return attend(query, keys[known], values[known], scale=scale, bias=bias[known])
        rows = query.shape[0]
        parts = [
            attend(
                query,
                keys[i, :, -n:].expand(rows, -1, -1, -1),
                values[i, :, -n:].expand(rows, -1, -1, -1),
                scale=scale,
            )
            for i, n in enumerate(self.bank.lengths)
        ]
        sums = torch.stack([part_sum for _, part_sum in parts])
        choice = self._choose(sums, own_sum)
        self.choices[layer] = choice
        pick = choice, torch.arange(rows, device=query.device)
        return torch.stack([attended for attended, _ in parts])[pick], sums[pick]

    def _choose(self, sums: Tensor, own_sum: Tensor) -> Tensor:
        """The prompt with the largest mean attention over heads, input tokens and its own tokens (paper, 3.1.1)."""
        assert self.context is not None
        total = torch.logsumexp(torch.cat([sums, own_sum[None]]), dim=0)
        paid = (sums - total).exp().mean(2)  # [prompts, rows, tokens]: attention to all tokens of a prompt
        context = self.context.to(sums.device)
        by_row = (paid * context).sum(-1) / context.sum(-1)
        return (by_row / torch.tensor(self.bank.lengths, device=sums.device)[:, None]).argmax(0)


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
    """Attention, by transformers' interface, in which every token also sees the cached prompt selected for its row.

    Args:
        module: the attention module; its ``layer_idx`` is its index into the cached keys and values.
        query, key, value: as for :func:`attend`, after rotary embedding if the architecture has it.
        attention_mask: None (causal), a boolean mask of what may be seen, or additive floats; without the prompts.
        scaling: factor on the dot products; ``width ** -0.5`` if None.
        reading: the current forward pass; if None, transformers' own attention is used.
        **kwargs: arguments of other attention functions; passed on if ``reading`` is None.

    Returns:
        ``[rows, queries, heads, width]``, and None instead of attention weights.
    """
    if reading is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

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


def register() -> None:
    """Register this attention with transformers under the name :data:`PROMPTED`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PROMPTED, prompted_attention)
    AttentionMaskInterface.register(PROMPTED, sdpa_mask)
