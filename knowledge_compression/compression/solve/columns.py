"""Which columns of a weight to remove, and the least-squares values of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS = 64  # at most so many rounds of removal, so that the work is a few matrix products


def least_missed(weight: Tensor, moments: Tensor, width: int, count: int) -> Tensor:
    """The units whose removal raises the squared output error least, each time after the best refit of the others.

    With ``P`` the inverse of the inputs' second moments ``H``, removing the columns ``S`` costs ``tr(W_S (P_SS)⁻¹
    W_Sᵀ)`` once all others are refitted. The refit adds ``-W_S (P_SS)⁻¹ P_S:`` to the weight and subtracts ``P_:S
    (P_SS)⁻¹ P_S:`` from ``P``: the optimal brain surgeon for groups (Hassibi & Stork 1993; Kurtic et al. 2023, ZipLM,
    equations 2 and 3). Units are removed one after the other, or in rounds of a 64th if there are many.

    Args:
        weight: float64 ``[out_features, units * width]``.
        moments: positive definite second moments ``[in_features, in_features]``.
        width: number of neighbouring columns that form a unit.
        count: number of units to remove.

    Returns:
        Indices of the removed units in ascending order, int64 ``[count]``.
    """
    units = weight.shape[1] // width
    weight, inverse = weight.clone(), torch.linalg.inv(moments)
    there = torch.ones(units, dtype=torch.bool, device=weight.device)
    gone: list[Tensor] = []
    for size in torch.tensor_split(torch.arange(count), min(count, _ROUNDS)) if count else []:
        errors = _errors(weight, inverse, width).masked_fill(~there, torch.inf)
        chosen = errors.argsort(stable=True)[: len(size)]
        there[chosen] = False
        gone.append(chosen)
        columns = _columns(chosen, width)
        rows = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        weight -= weight[:, columns] @ rows
        inverse -= inverse[:, columns] @ rows
        weight[:, columns] = 0
    return torch.cat(gone).sort().values if gone else torch.empty(0, dtype=torch.long, device=weight.device)


def _errors(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    units = weight.shape[1] // width
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal().clamp(min=1e-300)
    errors = weight.new_zeros(units)
    for unit in range(units):
        part = slice(unit * width, (unit + 1) * width)
        columns, square = weight[:, part], inverse[part, part]
        if bool(square.diagonal().abs().max() > 0) and bool(columns.abs().max() > 0):
            errors[unit] = (torch.linalg.lstsq(square, columns.T).solution.T * columns).sum()
    return errors


def _columns(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def refitted(weight: Tensor, moments: Tensor, kept: Tensor) -> Tensor:
    """The values of the kept columns whose outputs are nearest to those of the whole weight: ``W H_:K (H_KK)⁻¹``.

    Args:
        weight: float64 ``[out_features, in_features]``.
        moments: positive definite second moments ``[in_features, in_features]``.
        kept: indices of the kept columns, int64.

    Returns:
        Float64 ``[out_features, len(kept)]``.
    """
    towards = weight @ moments[:, kept]
    return torch.linalg.solve(moments[kept][:, kept], towards.T).T


def damped(moments: Tensor, damping: float) -> Tensor:
    """Second moments in float64 with a constant added to the diagonal, relative to its mean."""
    moments = moments.double()
    return moments + damping * moments.diagonal().mean().clamp(min=1e-30) * torch.eye(len(moments)).to(moments)
