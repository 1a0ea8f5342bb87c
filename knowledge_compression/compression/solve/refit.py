"""Least squares over the kept weights, once the mask is fixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor


_OUTPUTS = 192  # outputs fitted at a time, so that they stay in the processor's cache and need little memory


def refit(columns: Tensor, original: Tensor, kept: Tensor, hessian: Tensor, *, damping: float, steps: int) -> None:
    """Fit the kept weights of every output jointly to the outputs of the original weights.

    A sweep over the columns (:func:`~.compensation.compensate`) lets a column compensate only for those before it, and
    weights that are fixed early never adapt to later removals. With the mask fixed, the best values of a row ``w`` are
    a least-squares problem, ``min (w - w0) H (w - w0)ᵀ`` over the kept entries, whose matrix differs from row to row.
    It is solved for many rows at once by conjugate gradients, preconditioned by the diagonal, in which each row's mask
    is applied beside the one product with the shared ``H`` (Meng et al. 2024, ALPS, section 3.3); no step makes the
    damped error larger.

    Args:
        columns: the pruned weight transposed, float32 ``[in_features, out_features]``; changed in place.
        original: the weight before pruning, of the same shape.
        kept: which entries may be other than zero, bool of the same shape.
        hessian: mean second moments of the inputs, ``[in_features, in_features]``.
        damping: constant added to its diagonal, relative to the diagonal's mean; it keeps weights near the original
            ones.
        steps: conjugate-gradient steps; each takes one product with the Hessian.
    """
    if not steps:
        return
    added = float(damping * hessian.diagonal().mean())

    def damped(vectors: Tensor) -> Tensor:  # the damped Hessian's products, without a copy of it
        return torch.addmm(vectors, hessian, vectors, beta=added)

    inverse_diagonal = (hessian.diagonal() + added).clamp(min=1e-30).reciprocal()[:, None]
    for part, wanted, free in zip(*(whole.split(_OUTPUTS, 1) for whole in (columns, original, kept)), strict=True):
        preconditioner = free * inverse_diagonal  # which also restricts every step to the kept weights
        residual = damped(wanted - part)
        direction, before = torch.zeros_like(residual), torch.ones_like(residual[0])
        for step in range(1, steps + 1):
            steepest = preconditioner * residual
            slope = torch.linalg.vecdot(residual, steepest, dim=0)
            direction = torch.addcmul(steepest, direction, slope / before)
            moved = damped(direction)
            # A row that has converged has a zero gradient: it no longer changes.
            length = slope / torch.linalg.vecdot(direction, moved, dim=0).clamp(min=1e-30)
            part.addcmul_(direction, length)
            if step < steps:
                residual.addcmul_(moved, length, value=-1)
                before = slope.clamp(min=1e-30)
