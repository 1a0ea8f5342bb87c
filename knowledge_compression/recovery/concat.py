"""Prompts concatenated into one: the simple baseline for Inference-time Dynamic Prompting (Hoang et al., Table 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.heavy import torch
from knowledge_compression.models import Model
from knowledge_compression.models.prompts import Prompts
from knowledge_compression.recovery.bank import bank_of
from knowledge_compression.recovery.prompted_network import Prompted
from knowledge_compression.recovery.several_prompts import SeveralPrompts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Concat(SeveralPrompts):
    """Prompts that are trained separately and concatenated before every input."""

    name = "concat"

    @property
    def positions(self) -> int:
        """The length of all prompts together."""
        return sum(self.prompts)

    def put(self, model: Model, prompts: Sequence[Tensor]) -> Prompts:
        """Place them as one prompt."""
        return Prompted(model, bank_of(model, [torch.cat(list(prompts))])).prompts
