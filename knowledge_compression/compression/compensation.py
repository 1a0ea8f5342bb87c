"""Column after column: each is put where it may be, and the columns after it make up for the error.

The step that GPTQ (Frantar et al. 2023, algorithm 1) and SparseGPT (Frantar and Alistarh 2023, algorithm 1) share; they
differ only in where a column may be put.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def compensate(
    columns: Tensor,
    upper: Tensor,
    project: Callable[[int, Tensor], Tensor],
    *,
    prepare: Callable[[int, int], None] = lambda start, end: None,
    unit: int = 1,
    block_size: int = 128,
) -> None:
    """Replace every column by its projection, and move its error onto the later ones as the Hessian says.

    Args:
        columns: the weight transposed, float32 ``[in_features, out_features]`` and contiguous, so that a column of the
            weight lies in one piece; changed in place.
        upper: ``U`` with ``H⁻¹ = Uᵀ U``, ``[in_features, in_features]``, in the order of ``columns``.
        project: gives, for a column's index and its up-to-date values ``[out_features]``, the values it gets.
        prepare: called with each ``[start, end)`` of ``unit`` columns when all that comes before them is made up for.
        unit: columns that are prepared together.
        block_size: columns whose errors are gathered before they move on to the columns after the block; it changes
            the speed and not the result.
    """
    width = len(columns)
    if block_size % unit and unit % block_size:
        block_size = unit * max(1, block_size // unit)
    pivots = upper.diagonal().tolist()
    for start in range(0, width, block_size):
        end = min(start + block_size, width)
        errors = torch.empty_like(columns[start:end])
        for i, column, error in zip(range(start, end), columns[start:end], errors, strict=True):
            if i % unit == 0:
                prepare(i, min(i + unit, width))
            projected = project(i, column)
            torch.sub(column, projected, out=error).div_(pivots[i])
            columns[i + 1 : end].addr_(upper[i, i + 1 : end], error, alpha=-1)
            column.copy_(projected)
        columns[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
