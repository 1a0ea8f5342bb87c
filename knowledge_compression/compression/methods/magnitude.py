"""Magnitude pruning: the smallest weights go (Namburi et al. 2023, section 3.1: global L1-unstructured pruning)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from knowledge_compression.compression.base import Ranked
from knowledge_compression.models import TargetLayer


@dataclass(frozen=True)
class Magnitude(Ranked):
    """Set the weights of smallest absolute value to zero; needs no text.

    With ``scope=global`` the same weights go as with ``torch.nn.utils.prune.global_unstructured(..., L1Unstructured)``,
    without its copy of all weights.
    """

    name = "magnitude"

    def score(self, layer: TargetLayer) -> Tensor:
        """The weights themselves."""
        return layer.weight
