"""Least squares over the weights that are left, once it is settled which they are."""

from __future__ import annotations

import torch
from torch import Tensor

_OUTPUTS = 128  # fitted at a time: what they need stays in cache, and little memory is taken


def refit(columns: Tensor, original: Tensor, kept: Tensor, hessian: Tensor, *, damping: float, steps: int) -> None:
    """Fit the kept weights of every output, together, to what the original weights gave.

    A sweep over the columns (:func:`~knowledge_compression.compression.compensation.compensate`) lets a column make up
    only for those before it, and weights that it freezes early never hear of what goes later. With the mask fixed, the
    best values of a row ``w`` are a least-squares problem, ``min (w - w0) H (w - w0)ᵀ`` over the kept entries, whose
    matrix differs from row to row. It is solved for many rows at once by conjugate gradients, preconditioned by the
    diagonal, in which each row's mask is applied after the one product with the shared ``H`` (Meng et al. 2024, ALPS,
    section 3.3); no step makes the damped error larger.

    Args:
        columns: the pruned weight transposed, float32 ``[in_features, out_features]``; changed in place.
        original: the weight before pruning, of the same shape.
        kept: which entries may be other than zero, bool of the same shape.
        hessian: mean second moments of the inputs, ``[in_features, in_features]``.
        damping: what is added to its diagonal, relative to its mean; it holds weights near the original ones.
        steps: of the method; each is one product with the Hessian.
    """
    if not steps:
        return
    damped = hessian.clone()
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    for part, wanted, mask in zip(*(whole.split(_OUTPUTS, 1) for whole in (columns, original, kept)), strict=True):
        _conjugate_gradients(part, wanted, mask.to(part), damped, steps)


def _conjugate_gradients(columns: Tensor, original: Tensor, kept: Tensor, damped: Tensor, steps: int) -> None:
    scale = damped.diagonal().clamp(min=1e-30).reciprocal()[:, None]
    residual = (damped @ (original - columns)).mul_(kept)
    direction = torch.zeros_like(residual)
    before: Tensor | float = torch.inf
    for _ in range(steps):
        steepest = residual * scale
        slope = (residual * steepest).sum(0)
        direction.mul_(slope / before).add_(steepest)
        moved = (damped @ direction).mul_(kept)
        # A row that has arrived has no slope left: it stays where it is.
        length = slope / (direction * moved).sum(0).clamp(min=1e-30)
        columns.addcmul_(direction, length)
        residual.addcmul_(moved, length, value=-1)
        before = slope.clamp(min=1e-30)
