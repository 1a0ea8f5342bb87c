"""Layers that read the same tensor, and its statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import torch

from knowledge_compression.compression.walk.statistics import LayerInputs, S
from knowledge_compression.models.families import EXPERTS
from knowledge_compression.models.targets import TargetLayer

FEWEST_TOKENS = 16  # needed for an expert to be compressed on its own inputs


@dataclass
class Group(Generic[S]):
    """Linears of a block that read the same tensor, and its statistics; only the first of them observes it."""

    statistics: S
    layers: list[TargetLayer] = field(default_factory=list)
    tokens: int = 0
    settled: bool = False

    @property
    def routed(self) -> bool:
        """Whether it belongs to an expert."""
        return self.layers[0].role == EXPERTS

    @property
    def few(self) -> bool:
        """Whether too few tokens were observed for useful statistics."""
        return self.tokens < FEWEST_TOKENS if self.routed else self.tokens == 0

    def settle(self, empty: Callable[[int], S], *, by_influence: bool) -> None:
        """If there are too few tokens, take the statistics of unknown inputs: features uncorrelated and equally large.

        With these, GPTQ rounds to nearest, and SparseGPT and Wanda remove the smallest weights.

        Args:
            empty: returns new statistics for inputs of a given width.
            by_influence: whether the statistics weight tokens by influence.
        """
        if not self.few or self.settled:
            return
        weight = self.layers[0].weight
        width = weight.shape[1]
        self.statistics, self.settled = empty(width), True
        influence = torch.ones(width, device=weight.device) if by_influence else None
        self.statistics.update(LayerInputs(torch.eye(width, device=weight.device), influence))
