"""Second moments of a layer's inputs: the curvature of its squared output error, and how it is inverted safely."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from knowledge_compression.compression.blocks import LayerInputs
from knowledge_compression.errors import BadInput

STRIPS = 6  # horizontal parts in which an upper triangle is multiplied: 7/12 of the work of the whole matrix
LADDER = 4  # times the damping is raised tenfold before a layer falls back


class Hessian:
    """``H = mean of x xᵀ`` over the tokens of the calibration text (GPTQ, Frantar et al. 2023, eq. 1 without the 2).

    Where the walk tells the influence of each token, the mean is weighted by it: the error that counts is then that of
    the block's output, to first order, and not that of the layer's.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self._weight = 0.0
        self._complete = False

    def update(self, inputs: LayerInputs) -> None:
        """Take in a batch, before the matrix is asked for."""
        if self._complete:
            raise RuntimeError("the sum of second moments has become their mean already")
        values, weighted = inputs.values.float(), inputs.values.float()
        if inputs.influence is not None:
            weighted = values * inputs.influence[:, None]
        for start, end in _strips(len(self._sum)):
            self._sum[start:end, start:].addmm_(weighted[:, start:end].T, values[:, start:])
        self._weight += len(values) if inputs.influence is None else float(inputs.influence.sum())

    @property
    def matrix(self) -> Tensor:
        """``H``, float32 ``[in_features, in_features]``, in the place of the sum."""
        matrix = self._sum
        if not self._complete:
            self._complete = True
            matrix /= self._weight or 1.0
            for start, end in _strips(len(matrix)):  # the upper triangle, turned over, with little copied
                matrix[end:, start:end] = matrix[start:end, end:].T
                square = matrix[start:end, start:end]
                square.copy_(square.triu() + square.triu(1).T)
        return matrix


def _strips(size: int) -> Iterator[tuple[int, int]]:
    width = math.ceil(size / STRIPS)
    for start in range(0, size, width):
        yield start, min(start + width, size)


@dataclass
class InverseFactor:
    """The upper triangular ``U`` with ``H⁻¹ = Uᵀ U`` of a damped Hessian.

    Attributes:
        upper: ``U``, float32.
        damping: what was added to the diagonal, relative to its mean.
        fallbacks: ``dead_input`` where an input never varies from zero, ``damping_raised`` where the first damping was
            too little.
    """

    upper: Tensor
    damping: float
    fallbacks: list[str] = field(default_factory=list)


def check_damping(damping: float) -> None:
    """Refuse a damping that cannot make a matrix more definite."""
    if damping <= 0:
        raise BadInput(f"compression.damping={damping} must be above 0, e.g. 0.01")


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> InverseFactor | None:
    """Factor the inverse of a Hessian, raising the damping tenfold until it is positive definite.

    One Cholesky factorisation of the matrix turned about both axes and one triangular inverse give ``U`` without
    forming the inverse itself, which would be less exact.

    Args:
        hessian: symmetric ``[n, n]``; left as it is.
        damping: first damping, relative to the mean of the diagonal.
        order: the order in which the factor takes the inputs, int64 ``[n]``; as they stand if None.

    Returns:
        The factor; None where no damping of the ladder helped.
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
        turned = hessian.index_select(0, backwards).index_select(1, backwards)
        turned.diagonal().copy_(torch.where(dead, mean, diagonal).add_(relative * mean)[backwards])
        turned, failed = torch.linalg.cholesky_ex(turned)
        if not int(failed):
            turned = turned.flip(0, 1)
            upper = torch.eye(len(turned), device=turned.device, dtype=turned.dtype)
            torch.linalg.solve_triangular(turned, upper, upper=True, out=upper)  # in place: such a matrix is large
            if bool(upper.sum().isfinite()):
                return InverseFactor(upper, relative, fallbacks + ["damping_raised"] * (step > 0))
    return None


def relative_errors(weight: Tensor, approximations: Sequence[Tensor], hessian: Tensor) -> list[float]:
    """Mean square of a layer's output error over that of its output, ``tr(D H Dᵀ) / tr(W H Wᵀ)``, of each."""
    power, *errors = (_power(part, hessian) for part in (weight, *(weight - a.to(weight) for a in approximations)))
    return [error / max(power, 1e-30) for error in errors]


def _power(weight: Tensor, hessian: Tensor) -> float:
    """``tr(W H Wᵀ)`` of a symmetric ``H``, of which the strips above the diagonal count twice."""
    total = weight.new_zeros(())
    for start, end in _strips(len(hessian)):
        outputs = weight[:, start:end] @ hessian[start:end, start:]
        outputs[:, end - start :].mul_(2)
        total += outputs.mul_(weight[:, start:]).sum()
    return float(total)


def relative_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """:func:`relative_errors` of one approximation."""
    return relative_errors(weight, [approximation], hessian)[0]
