"""Project each column in turn; the columns after it compensate for its error.

The step that GPTQ (Frantar et al. 2023, algorithm 1) and SparseGPT (Frantar and Alistarh 2023, algorithm 1) share; they
differ only in where a column may be put.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_LEAF = 16  # columns that tell each other their errors one by one; runs of more do so in products of matrices


def compensate(
    columns: Tensor,
    upper: Tensor,
    project: Callable[[int, Tensor], Tensor],
    *,
    prepare: Callable[[int, int], None] = lambda start, end: None,
    unit: int = _LEAF,
    block_size: int = 128,
) -> None:
    """Replace every column by its projection, and move its error onto the later ones as the Hessian says.

    Args:
        columns: the weight transposed, float32 ``[in_features, out_features]`` and contiguous, so that a column of the
            weight lies in one piece; changed in place.
        upper: ``U`` of an :class:`~knowledge_compression.compression.solve.hessian.InverseFactor`, ``[in_features,
            in_features]``, in the order of ``columns``.
        project: gives, for a column's index and its up-to-date values ``[out_features]``, a tensor of those it gets.
        prepare: called with each ``[start, end)`` of ``unit`` columns when all that comes before them is made up for.
        unit: columns that are prepared together.
        block_size: columns whose errors are gathered before they move on to the columns after the block, rounded to
            whole units; it changes the speed and not the result.
    """
    block_size = unit * max(1, block_size // unit)
    errors = columns.new_empty(block_size, columns.shape[1])

    def errors_of(start: int, end: int) -> Tensor:
        return errors[start % block_size :][: end - start]

    def move(start: int, middle: int, end: int) -> None:
        columns[middle:end].addmm_(upper[start:middle, middle:end].T, errors_of(start, middle), alpha=-1)

    def one_by_one(start: int, end: int) -> None:
        part, rows = columns[start:end], upper[start:end, start:end]
        projected = []
        for i, column, error, row in zip(range(start, end), part, errors_of(start, end), rows, strict=True):
            projected.append(project(i, column))
            torch.sub(column, projected[-1], out=error)
            part.addr_(row, error, alpha=-1)  # a whole row, whose zeros leave what is done as it is, needs no slicing
        torch.stack(projected, out=part)  # which the ones in the rows made it but for rounding

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
    """Sweep the first half, move its errors onto the second, sweep that; down to runs of ``whole`` columns."""
    if end - start <= whole:
        sweep(start, end)
        return
    middle = start + whole * math.ceil((end - start) / whole / 2)
    _halve(start, middle, whole, sweep, move)
    move(start, middle, end)
    _halve(middle, end, whole, sweep, move)
