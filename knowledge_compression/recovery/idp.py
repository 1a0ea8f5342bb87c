"""Inference-time Dynamic Prompting: the input selects one of several prompts (Hoang et al., section 3.1.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.prompts import Prompts
from knowledge_compression.recovery.bank import bank_of
from knowledge_compression.recovery.prompted_network import Prompted
from knowledge_compression.recovery.selection import PER_LAYER, SELECTIONS
from knowledge_compression.recovery.several_prompts import SeveralPrompts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Idp(SeveralPrompts):
    """Prompts of several lengths, each trained as by ``recovery=prompt``; the input selects one of them.

    The prompts do not attend to each other, and their keys and values are computed once. The prompt that gets the most
    attention from the input (mean over heads, input tokens and the prompt's tokens) is selected; the answer being
    scored has no influence.

    Attributes:
        selection: ``per_layer`` (each attention layer selects, as in the paper's wording) or ``once`` (the first layer
            selects for all).
    """

    selection: str = PER_LAYER
    name = "idp"

    def __post_init__(self) -> None:
        """Refuse an unknown selection."""
        super().__post_init__()
        if self.selection not in SELECTIONS:
            raise BadInput(f"recovery.selection={self.selection} does not exist; choose one of {', '.join(SELECTIONS)}")

    @property
    def positions(self) -> int:
        """The length of the longest prompt."""
        return max(self.prompts)

    def put(self, model: Model, prompts: Sequence[Tensor]) -> Prompts:
        """Place them as alternatives for the input to choose from."""
        return Prompted(model, bank_of(model, prompts), self.selection).prompts

    def details(self) -> dict[str, Any]:
        """The way of selecting."""
        return {"selection": self.selection}
