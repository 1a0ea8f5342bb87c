"""Random pruning: the control that every other choice of weights must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import LongTensor

from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.compression.solve.unstructured import check_settings, prune
from knowledge_compression.models import Model, TargetLayer, Targets


@dataclass(frozen=True)
class RandomPruning:
    """Set weights drawn by lot to zero.

    Attributes:
        sparsity: share of the targets' weights to remove, in [0, 1).
        scope: ``global`` (drawn from all targets together) or ``layer`` (the same share of each).
        pattern: ``n:m``, e.g. ``2:4``: n drawn to stay of every m neighbouring inputs.
        seed: of the draw; the same on every device.
    """

    sparsity: float
    scope: str = "global"
    pattern: str | None = None
    seed: int = 0
    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse settings that do not exist before anything is loaded."""
        check_settings(self.sparsity, self.scope, self.pattern)

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None) -> CompressionReport:
        """Prune the targets in place."""
        return prune(
            "random", model, targets, self._lots, sparsity=self.sparsity, scope=self.scope, pattern=self.pattern
        )

    def _lots(self, layer: TargetLayer) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{layer.path}".encode()))
        return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)
