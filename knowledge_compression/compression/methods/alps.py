"""ALPS: the weights to remove and the values of the others sought together by ADMM (Meng et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.building import Positive
from knowledge_compression.compression.base import Patterned, check_sparsity
from knowledge_compression.compression.calibrated import SecondOrder, Solved
from knowledge_compression.compression.solve.admm import Split, largest
from knowledge_compression.compression.solve.hessian import Hessian
from knowledge_compression.compression.solve.refit import refit
from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

_REFIT = 10  # conjugate-gradient steps, as published


@dataclass(frozen=True)
class Alps(Patterned, SecondOrder):
    """Prune to the least squared output error that alternating directions find, then refit what is kept.

    Algorithm 1 of the paper with the schedule of the authors' code: the mask may change until it has settled, so that a
    weight that was removed early can come back, which SparseGPT's single sweep cannot do.

    Attributes:
        sparsity: share of each layer's weights to remove, in [0, 1).
        pattern: ``n:m``, e.g. ``2:4``: keep n of every m neighbouring inputs; the sparsity is then that of the pattern.
        iterations: at most, of the alternation.
    """

    sparsity: float
    pattern: str | None = None
    iterations: Positive = 300
    name = "alps"

    def __post_init__(self) -> None:
        """Refuse settings that do not exist before anything is loaded."""
        super().__post_init__()
        check_sparsity(self.sparsity)
        _ = self.shape

    def solve(self, weight: Tensor, statistics: Hessian, heights: Sequence[int]) -> Solved:
        """Prune the stacked weight, each layer in it to exactly the given sparsity."""
        return self.prune(weight, statistics.matrix, heights)

    def prune(self, weight: Tensor, hessian: Tensor, heights: Sequence[int] | None = None) -> Solved:
        """The algorithm itself, on tensors alone.

        Args:
            weight: float32 ``[out_features, in_features]``.
            hessian: mean second moments of the inputs, ``[in_features, in_features]``.
            heights: number of rows of each layer stacked in ``weight``; each is pruned to the sparsity separately.
        """
        split = Split(hessian, self.damping)
        turned = weight.T.clone()
        kept = torch.zeros_like(turned, dtype=torch.bool)
        rows = list(heights or [len(weight)])
        for part, there in zip(turned.split(rows, dim=1), kept.split(rows, dim=1), strict=True):
            for place, found in zip((part, there), split.solve(part, self._keeps, self.iterations), strict=True):
                place.copy_(found)
        refit(turned, weight.T, kept, hessian, damping=self.damping, steps=_REFIT)
        return Solved(weight=turned.T, removed=~kept.T, damping=self.damping, fallbacks=split.fallbacks)

    def _keeps(self, values: Tensor) -> Tensor:
        """Which entries of ``[in_features, out_features]`` to keep."""
        if self.shape:
            return ~self.shape.removes(values.T).T
        return largest(values, values.numel() - round(self.sparsity * values.numel()))
