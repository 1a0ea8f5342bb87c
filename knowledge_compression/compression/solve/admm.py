"""Sparse least squares by splitting: a dense copy of the weights and a sparse one are drawn together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

_FIRST, _MOST = 0.1, 1e6  # how strongly the two copies are drawn together, at first and at most
_EVERY = 3  # iterations between two looks at the mask
# By how much that grows while more than a share of as many entries as are kept has changed since the last look.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
# Above this share of changes the mask is moving; until then the copies were drawn together too hard.
_CLEARLY = 0.005
_SOFTER = 5.0  # by how much they are drawn less until then
_SETTLED, _PATIENCE = 0.0003, 30  # below this share of changes it stops, from this iteration on


class Split:
    """Least squares under a limit on which entries may be other than zero, for weights that read the same inputs.

    ``min ||(B - B0) X||²`` by the alternating directions of ALPS (Meng et al. 2024, equations 4 and 8, algorithm 1):
    inputs are divided by their norms, the dense copy solves a ridge regression, whose inverse comes from one eigenvalue
    decomposition, the sparse copy is the dense one projected, and the penalty on their difference grows with the
    changes of the mask, as in the authors' code.

    Args:
        hessian: mean second moments of the inputs, ``[in_features, in_features]``.
        damping: constant added to its diagonal, relative to the diagonal's mean.

    Attributes:
        fallbacks: ``dead_input`` if an input is always zero.
    """

    def __init__(self, hessian: Tensor, damping: float) -> None:
        diagonal = hessian.diagonal()
        self.fallbacks = ["dead_input"] if bool((diagonal <= 0).any()) else []
        added = damping * diagonal.mean()
        self._norms = (diagonal + added).sqrt().clamp(min=1e-8)[:, None]
        scaled = hessian / self._norms / self._norms.T
        scaled.diagonal().add_(added / self._norms[:, 0].square())
        self._scaled = scaled
        values, vectors = torch.linalg.eigh(scaled.double())
        self._values, self._vectors = values.clamp(min=0), vectors

    def solve(self, weight: Tensor, keeps: Callable[[Tensor], Tensor], iterations: int) -> tuple[Tensor, Tensor]:
        """The sparse weights, and which of them are kept.

        Args:
            weight: transposed, float32 ``[in_features, out_features]``.
            keeps: which entries of such a matrix, whose inputs have norm 1, are largest and stay.
            iterations: at most.

        Returns:
            Both of the same shape; weights are zero where they are removed.
        """
        start = weight * self._norms
        wanted = self._scaled @ start
        penalty, moving = _FIRST, False
        inverse = self._inverse(penalty)
        dense, mask = start, keeps(start)
        sparse, pull = start * mask, torch.zeros_like(start)
        before, count = mask, int(mask.sum())
        for iteration in range(1, iterations + 1):
            dense = inverse @ (wanted - pull + penalty * sparse)
            sparse = dense + pull / penalty
            mask = keeps(sparse)
            sparse = sparse * mask
            pull = pull + penalty * (dense - sparse)
            if iteration % _EVERY:
                continue
            changed, before = int((mask != before).sum()), mask
            moving = moving or changed > _CLEARLY * count
            if moving:
                if not changed:
                    break
                penalty *= next(growth for share, growth in _GROWTH if changed > share * count)
            else:
                penalty /= _SOFTER
                if changed:  # begin again
                    sparse, pull = start * keeps(start), torch.zeros_like(start)
            penalty = min(penalty, _MOST)
            if iteration > _PATIENCE and changed < _SETTLED * count:
                break
            inverse = self._inverse(penalty)
        mask = keeps(dense)
        return dense * mask / self._norms, mask

    def _inverse(self, penalty: float) -> Tensor:
        return ((self._vectors / (self._values + penalty)) @ self._vectors.T).to(self._scaled)


def largest(values: Tensor, count: int) -> Tensor:
    """Mask of the largest entries by magnitude, bool of the same shape."""
    order = values.abs().flatten().topk(count).indices
    return torch.zeros(values.numel(), dtype=torch.bool, device=values.device).scatter_(0, order, True).view_as(values)
