"""Random pruning: the control that every other pruning method must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.building import Seed
from knowledge_compression.compression.base import Ranked
from knowledge_compression.heavy import torch
from knowledge_compression.models import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RandomPruning(Ranked):
    """Set randomly chosen weights to zero; needs no text.

    Attributes:
        seed: of the random choice, which is the same on every device.
    """

    seed: Seed = 0
    name = "random"

    def score(self, layer: TargetLayer) -> Tensor:
        """Uniform random numbers, float32, determined by the layer's path and the seed."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{layer.path}".encode()))
        return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)
