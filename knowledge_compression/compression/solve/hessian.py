"""Second moments of a layer's inputs: the curvature of its squared output error, and a safe way to invert it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from knowledge_compression.compression.walk.statistics import LayerInputs, Statistics
from knowledge_compression.heavy import torch
from knowledge_compression.models.device import by_bfloat16_units

if TYPE_CHECKING:
    from torch import Tensor

STRIPS = 12  # parts in which a triangle is multiplied: 13/24 of the work for the whole matrix
_BROAD = 3  # of them at once by bfloat16 units, which thin strips do not keep busy
_LEAF = 128  # rows of a triangle that are inverted at once
_PIECE = 1 << 18  # numbers reversed at once
LADDER = 4  # how often the damping is raised tenfold before giving up


class Hessian(Statistics):
    """``H = mean of x xᵀ`` over the tokens of the calibration text (GPTQ, Frantar et al. 2023, eq. 1 without the 2).

    If the walk measures the influence of each token, the mean is weighted by it: the error is then, to first order,
    that of the block's output rather than of the layer's.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self._weight = 0.0
        self._complete = False

    def update(self, inputs: LayerInputs) -> None:
        """Add a batch; not allowed once the matrix has been read."""
        if self._complete:
            raise RuntimeError("the sum of second moments has already been turned into their mean")
        values = inputs.values.to(inputs.narrower or inputs.values.dtype).float()  # as the layer multiplies them
        weighted = values if inputs.influence is None else values * inputs.influence[:, None]
        narrow = inputs.narrower == torch.bfloat16 and inputs.influence is None  # so bfloat16 holds both sides exactly
        with by_bfloat16_units() if narrow else nullcontext():
            for start, end in _strips(len(self._sum), _BROAD if narrow else 1):
                self._sum[start:end, start:].addmm_(weighted[:, start:end].T, values[:, start:])
        self._weight += len(values) if inputs.influence is None else float(inputs.influence.sum())

    @property
    def matrix(self) -> Tensor:
        """``H``, float32 ``[in_features, in_features]``; overwrites the sum."""
        matrix = self._sum
        if not self._complete:
            self._complete = True
            matrix /= self._weight or 1.0
            for start, end in _strips(len(matrix)):  # the sums above the diagonal, mirrored
                matrix[end:, start:end] = matrix[start:end, end:].T
                square = matrix[start:end, start:end]
                square.copy_((square + square.T).mul_(0.5))  # with influence the two halves may round differently
        return matrix

    @property
    def second_moments(self) -> Tensor:
        """:attr:`matrix`."""
        return self.matrix


def _strips(size: int, at_once: int = 1) -> Iterator[tuple[int, int]]:
    width = math.ceil(size / STRIPS) * at_once
    for start in range(0, size, width):
        yield start, min(start + width, size)


@dataclass
class InverseFactor:
    """``H⁻¹ = Uᵀ D U`` of a damped Hessian: ``U`` upper triangular with ones on its diagonal, ``D`` diagonal.

    Attributes:
        upper: ``U``, float32 ``[n, n]``: how the later inputs change to compensate for a unit error in an input.
        pivots: the diagonal of ``D``, ``[n]``: for each input, its diagonal entry in the inverse of the Hessian of that
            input and all later ones.
        damping: constant added to the diagonal, relative to its mean.
        fallbacks: ``dead_input`` if an input is always zero, ``damping_raised`` if the first damping was too small.
    """

    upper: Tensor
    pivots: Tensor
    damping: float
    fallbacks: list[str] = field(default_factory=list)


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> InverseFactor | None:
    """Factor the inverse of a Hessian, raising the damping tenfold until it is positive definite.

    One Cholesky factorisation of the matrix with both axes reversed and one triangular inverse give ``U`` without
    forming the inverse itself, which would be less accurate. Only one matrix is needed besides the Hessian.

    Args:
        hessian: symmetric ``[n, n]``; not modified.
        damping: first damping, relative to the mean of the diagonal.
        order: the order of the inputs in the factor, int64 ``[n]``; their own order if None.

    Returns:
        The factor; None if no damping that was tried was enough.
    """
    fallbacks = []
    diagonal = hessian.diagonal()
    backwards = (torch.arange(len(hessian), device=hessian.device) if order is None else order).flip(0)
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones((), device=hessian.device)
    if bool(dead.any()):
        fallbacks.append("dead_input")
    for step in range(LADDER):
        relative = damping * 10**step
        factor = torch.empty_like(hessian)
        for start, end in _strips(len(hessian)):
            rows = hessian.index_select(0, backwards[start:end])
            torch.index_select(rows, 1, backwards, out=factor[start:end])
        factor.diagonal().copy_(torch.where(dead, mean, diagonal).add_(relative * mean)[backwards])
        failed = hessian.new_zeros((), dtype=torch.int32)
        by_columns = factor.mT  # column-major, as LAPACK expects, so that nothing is copied
        torch.linalg.cholesky_ex(by_columns, upper=True, out=(by_columns, failed))
        if not int(failed):
            _turn(factor)
            _invert(factor)
            if bool(factor.sum().isfinite()):
                roots = factor.diagonal().clone()
                factor /= roots[:, None]
                return InverseFactor(factor, roots.square(), relative, fallbacks + ["damping_raised"] * (step > 0))
    return None


def _turn(matrix: Tensor) -> None:
    """Reverse both axes of a matrix in place, so that its last number comes first."""
    numbers = matrix.view(-1)
    half = len(numbers) // 2
    for start in range(0, half, _PIECE):
        end = min(start + _PIECE, half)
        front, back = numbers[start:end], numbers[len(numbers) - end : len(numbers) - start]
        front_turned = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(front_turned)


def _invert(upper: Tensor) -> None:
    """Invert an upper triangular matrix in place: its off-diagonal quarter, then each half of the diagonal."""
    size = len(upper)
    if size <= _LEAF:
        upper.copy_(torch.linalg.solve_triangular(upper, torch.eye(size).to(upper), upper=True))
        return
    first, second = slice(0, size // 2), slice(size // 2, size)
    quarter = upper[first, second]
    torch.linalg.solve_triangular(upper[first, first], quarter, upper=True, out=quarter)
    torch.linalg.solve_triangular(upper[second, second], quarter, upper=True, left=False, out=quarter)
    quarter.neg_()
    _invert(upper[first, first])
    _invert(upper[second, second])


def relative_errors(weight: Tensor, approximations: Sequence[Tensor], hessian: Tensor) -> list[float]:
    """Mean square of the output error over that of the output, ``tr(D H Dᵀ) / tr(W H Wᵀ)``, for each layer."""
    power = max(_power(weight, hessian), 1e-30)
    return [_power(weight - approximation.to(weight), hessian) / power for approximation in approximations]


def _power(weight: Tensor, hessian: Tensor) -> float:
    """``tr(W H Wᵀ)`` of a symmetric ``H``; entries below the diagonal count twice."""
    total = hessian.new_zeros(())
    for start, end in _strips(len(hessian)):
        part = weight[:, start:end]
        outputs = part @ hessian[start:end, start:end]
        outputs.addmm_(weight[:, end:], hessian[end:, start:end], alpha=2)
        total += outputs.mul_(part).sum()
    return float(total)
