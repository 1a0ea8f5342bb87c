"""Inference-time Dynamic Prompting: several prompts, and the input picks (Hoang et al., section 3.1.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.prompts import Prompts
from knowledge_compression.recovery.bank import bank_of
from knowledge_compression.recovery.prompted_network import Prompted
from knowledge_compression.recovery.selection import PER_LAYER, SELECTIONS
from knowledge_compression.recovery.several_prompts import SeveralPrompts


@dataclass(frozen=True)
class Idp(SeveralPrompts):
    """Prompts of several lengths, trained one by one as ``recovery=prompt`` trains them; the input picks one.

    The prompts do not attend to each other and their keys and values are computed once. Picked is the prompt to which
    the input pays the most attention (mean over heads, input tokens and the prompt's tokens), never the answer that is
    being scored.

    Attributes:
        selection: ``per_layer`` (each attention layer picks, as the paper words it) or ``once`` (the first layer picks
            for all).
    """

    selection: str = PER_LAYER
    name = "idp"

    def __post_init__(self) -> None:
        """Refuse a selection that does not exist."""
        super().__post_init__()
        if self.selection not in SELECTIONS:
            raise BadInput(f"recovery.selection={self.selection} does not exist; choose one of {', '.join(SELECTIONS)}")

    @property
    def positions(self) -> int:
        """Those of the longest."""
        return max(self.prompts)

    def put(self, model: Model, prompts: Sequence[Tensor]) -> Prompts:
        """Side by side, for the input to choose from."""
        return Prompted(model, bank_of(model, prompts), self.selection).prompts

    def details(self) -> dict[str, Any]:
        """How one is chosen."""
        return {"selection": self.selection}
