"""Magnitude pruning: the smallest weights go (Namburi et al. 2023, section 3.1: global L1-unstructured pruning)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import LongTensor

from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.compression.solve.threshold import Cut
from knowledge_compression.compression.solve.unstructured import check_settings, prune
from knowledge_compression.models import Model, Targets


@dataclass(frozen=True)
class Magnitude:
    """Set the weights of smallest absolute value to zero.

    ``scope=global`` removes the same weights as ``torch.nn.utils.prune.global_unstructured(..., L1Unstructured)``,
    without its copy of all weights. Among weights equal to the threshold the first in forward order go, so that the
    count is exact.

    Attributes:
        sparsity: share of the targets' weights to remove, in [0, 1).
        scope: ``global`` (one threshold over all targets) or ``layer`` (one for each).
        pattern: ``n:m``, e.g. ``2:4``: keep n of every m neighbouring inputs; the sparsity is then that of the pattern.
    """

    sparsity: float
    scope: str = "global"
    pattern: str | None = None
    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse settings that do not exist before anything is loaded."""
        check_settings(self.sparsity, self.scope, self.pattern)

    @property
    def layerwise(self) -> bool:
        """Whether each layer is pruned by itself."""
        return self.scope == "layer" or self.pattern is not None

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None) -> CompressionReport:
        """Prune the targets in place."""
        return self.prune_at(model, targets, None)

    def prune_at(self, model: Model, targets: Targets, cut: Cut | None) -> CompressionReport:
        """Prune the targets at a cut that was found before, among more layers than these; None finds it here."""
        return prune(
            "magnitude",
            model,
            targets,
            lambda layer: layer.weight,
            sparsity=self.sparsity,
            scope=self.scope,
            pattern=self.pattern,
            cut=cut,
        )
