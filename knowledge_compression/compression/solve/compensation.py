"""Project each column in turn; the columns after it compensate for its error.

This is the step that GPTQ (Frantar et al. 2023, algorithm 1) and SparseGPT (Frantar and Alistarh 2023, algorithm 1)
share; they differ only in the projection of a column.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from knowledge_compression.compression.solve.hessian import InverseFactor


_LEAF = 16  # columns whose errors are propagated one by one; for longer runs matrix products do it


def compensate(
    columns: Tensor,
    upper: Tensor,
    project: Callable[[int, Tensor], Tensor],
    *,
    prepare: Callable[[int, int], None] = lambda start, end: None,
    unit: int = _LEAF,
    block_size: int = 128,
    pull: Tensor | None = None,
) -> None:
    """Replace every column by its projection, and let the later columns compensate for its error as the Hessian
    prescribes.

    Args:
        columns: the transposed weight, float32 ``[in_features, out_features]``, contiguous, so that a column of the
            weight is contiguous in memory; changed in place.
        upper: ``U`` of an :class:`~knowledge_compression.compression.solve.hessian.InverseFactor`, ``[in_features,
            in_features]``, in the order of ``columns``.
        project: maps a column's index and its current values ``[out_features]`` to its new values.
        prepare: called with each range ``[start, end)`` of ``unit`` columns once all errors before it have been
            compensated for.
        unit: columns that are prepared together.
        block_size: columns whose errors are accumulated before they are applied to the columns after the block, rounded
            to whole units; it affects the speed, not the result.
        pull: ``[in_features, in_features]``, zero on and below the diagonal: how much each column's value at its
            projection moves the later columns in addition (:func:`pull`).
    """
    block_size = unit * max(1, block_size // unit)
    errors = columns.new_empty(block_size, columns.shape[1])
    values = errors if pull is None else torch.empty_like(errors)

    def of(kept: Tensor, start: int, end: int) -> Tensor:
        return kept[start % block_size :][: end - start]

    def move(start: int, middle: int, end: int) -> None:
        columns[middle:end].addmm_(upper[start:middle, middle:end].T, of(errors, start, middle), alpha=-1)
        if pull is not None:
            columns[middle:end].addmm_(pull[start:middle, middle:end].T, of(values, start, middle))

    def one_by_one(start: int, end: int) -> None:
        part, rows = columns[start:end], upper[start:end, start:end]
        pulls = rows if pull is None else pull[start:end, start:end]
        projected = []
        for i, column, error, row in zip(range(start, end), part, of(errors, start, end), rows, strict=True):
            projected.append(project(i, column))
            torch.sub(column, projected[-1], out=error)
            if pull is not None:
                values[i % block_size].copy_(column)
                part.addr_(pulls[i - start], values[i % block_size])
            part.addr_(row, error, alpha=-1)  # unsliced: zeros leave finished columns as they are
        torch.stack(projected, out=part)  # which it already is up to rounding, because of the ones on the diagonal

    def prepared(start: int, end: int) -> None:
        prepare(start, end)
        _halve(start, end, _LEAF, one_by_one, move)

    for start in range(0, len(columns), block_size):
        end = min(start + block_size, len(columns))
        _halve(start, end, unit, prepared, move)
        move(start, end, len(columns))


def _halve(
    start: int, end: int, whole: int, sweep: Callable[[int, int], None], move: Callable[[int, int, int], None]
) -> None:
    """Sweep the first half, apply its errors to the second, sweep that; recursively down to ``whole`` columns."""
    if end - start <= whole:
        sweep(start, end)
        return
    middle = start + whole * math.ceil((end - start) / whole / 2)
    _halve(start, middle, whole, sweep, move)
    move(start, middle, end)
    _halve(middle, end, whole, sweep, move)


def pull(lacking: Tensor, factor: InverseFactor, order: Tensor) -> Tensor:
    """By how much each column moves those after it because of what its input lacks (GPTAQ, Li et al. 2025).

    With ``H⁻¹ = Rᵀ R`` (``R`` upper triangular) and ``M`` the entries above the diagonal, this is ``((D Rᵀ) ∘ M) R``:
    row ``i`` is what the least-squares solution in the columns after ``i`` adds for the residual of column ``i``.

    Args:
        lacking: ``D``, the mean of ``(x' - x) xᵀ`` with ``x'`` the inputs in the uncompressed network,
            ``[in_features, in_features]``.
        factor: of the inverse Hessian, in ``order``.
        order: the order of the columns.

    Returns:
        Float32 ``[in_features, in_features]`` in that order, zero on and below the diagonal.
    """
    turned = lacking[order][:, order]
    return ((turned @ factor.upper.T) * factor.pivots).triu_(1) @ factor.upper
