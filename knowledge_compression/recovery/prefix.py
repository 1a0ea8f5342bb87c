"""Prefix tuning: trained keys and values in every layer (Li & Liang, 2021; "ptune" in the paper's tables)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knowledge_compression.models import Model
from knowledge_compression.models.prompts import Prompts
from knowledge_compression.recovery.adapters import Adapter
from knowledge_compression.recovery.bank import PromptBank, check_decoder, check_positions, key_shape
from knowledge_compression.recovery.base import RestoresBy
from knowledge_compression.recovery.prompt import by_peft, check_prompt
from knowledge_compression.recovery.prompted_network import Prompted
from knowledge_compression.recovery.tuned import OneAdapter

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Prefix(OneAdapter):
    """Train the keys and values of a prefix in every layer of a decoder.

    Attributes:
        tokens: length of the prefix; the paper uses 26, 50 and 100.
    """

    tokens: int = 50
    name = "prefix"
    restores_by = RestoresBy.REDIRECTION

    def __post_init__(self) -> None:
        """Refuse empty prefixes."""
        check_prompt(self.tokens)

    @property
    def kind(self) -> Mapping[str, Any]:
        """Its length."""
        return {"tokens": self.tokens}

    @property
    def positions(self) -> int:
        """Its length."""
        return self.tokens

    def check(self, model: Model) -> None:
        """Refuse models that are not decoders with full attention and enough positions."""
        check_decoder(model)
        check_positions(model, self.tokens)

    def trainable(self, model: Model) -> nn.Module:
        """Return the network with an untrained prefix."""
        from peft import PrefixTuningConfig, TaskType

        config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=self.tokens)
        return by_peft(model, config)

    def put(self, model: Model, adapter: Adapter) -> Prompts:
        """Place the prefix before the model's input."""
        (trained,) = adapter.tensors.values()
        return Prompted(model, prefix_bank(model, trained)).prompts


def prefix_bank(model: Model, trained: Tensor) -> PromptBank:
    """The trained keys and values as a bank of one prompt; peft stores ``[tokens, layers * 2 * heads * width]``."""
    heads, width = key_shape(model)
    layers = trained.to(model.device, model.dtype).view(len(trained), -1, 2, heads, width).permute(1, 2, 3, 0, 4)
    return PromptBank.stack([[(keys, values) for keys, values in layers]])
