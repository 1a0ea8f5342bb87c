"""Magnitude pruning: remove the smallest weights (Namburi et al. 2023, section 3.1: global L1-unstructured pruning)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.compression.base import Ranked
from knowledge_compression.models import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Magnitude(Ranked):
    """Set the weights with the smallest absolute values to zero; needs no text.

    With ``scope=global`` it removes the same weights as ``torch.nn.utils.prune.global_unstructured(...,
    L1Unstructured)``, without copying all weights.
    """

    name = "magnitude"

    def score(self, layer: TargetLayer) -> Tensor:
        """The weights themselves."""
        return layer.weight
