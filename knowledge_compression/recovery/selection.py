"""What a decoder attends to when cached prompts stand before its input, as an attention function of transformers.

Attention to the input and to a prompt are computed apart and put together exactly, so no mask over prompts and input is
ever made and the causal kernel stays in use. Their log-sum-exps are also all that Inference-time Dynamic Prompting
needs to see how much attention the input pays to each prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from knowledge_compression.recovery.bank import PromptBank
from knowledge_compression.recovery.bank_attention import attend

PROMPTED = "prompted"  # the name under which transformers finds the attention function below
PER_LAYER, ONCE = "per_layer", "once"
SELECTIONS = (PER_LAYER, ONCE)


@dataclass
class Reading:
    """One pass of a network over some rows: which prompt each row uses in each layer.

    Attributes:
        bank: the prompts.
        selection: ``per_layer`` or ``once``.
        context: float ``[rows, tokens]``, 1 for the input tokens whose attention chooses; None once all is chosen.
        choices: prompt of each row by layer, ``[rows]`` each; filled as the layers are passed.
    """

    bank: PromptBank
    selection: str
    context: Tensor | None
    choices: dict[int, Tensor] = field(default_factory=dict)

    def attend_to_prompt(self, layer: int, query: Tensor, own_sum: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attend to the prompt that each row uses in this layer, choosing it first where it is not chosen yet.

        Args:
            layer: index of the layer.
            query: ``[rows, heads, tokens, width]``.
            own_sum: log-sum-exp of the scores of the input with itself, ``[rows, heads, tokens]``.
            scale: factor on the dot products.

        Returns:
            Attended prompt values ``[rows, heads, tokens, width]`` and their log-sum-exp ``[rows, heads, tokens]``.
        """
        known = self.choices.get(0 if self.selection == ONCE else layer)
        keys, values = self.bank.keys[layer], self.bank.values[layer]
        if known is not None:
            return attend(query, keys[known], values[known], scale=scale, bias=self.bank.bias[known])
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
        by_row = (paid * self.context).sum(-1) / self.context.sum(-1)
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
