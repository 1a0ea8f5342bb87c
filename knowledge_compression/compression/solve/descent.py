"""Codes and scales of a rounded weight, improved in turn until its layer's output error settles."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from knowledge_compression.compression.solve.grid import QuantizedWeight, float_of, spread, storable
from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 32  # columns whose changes reach the other columns together
_SYSTEMS = 1 << 22  # numbers in the equations for the scales that are solved together
_RIDGE = 1e-9  # keeps a group's scale where its codes do not determine it


def descended(
    weight: Tensor,
    start: QuantizedWeight,
    hessian: Tensor,
    *,
    damping: float,
    rounds: int,
    lacking: Tensor | None = None,
) -> QuantizedWeight:
    """Lower the damped output error of a rounded weight; no step raises it.

    One sweep over the columns fixes each code for good, and the scales before any code. Here a round first solves for
    all scales of a row together, with its codes fixed, which is a least-squares problem; then it visits each column
    again and takes the code that is best given all others. Such coordinate descent is that of QuantEase (Behdin et al.
    2023); scales as further coordinates are that of COMQ (Zhang et al. 2024). Zero points stay.

    Args:
        weight: the weight before rounding, float32 ``[out_features, in_features]``.
        start: what it was rounded to.
        hessian: mean second moments ``H`` of the inputs, ``[in_features, in_features]``.
        damping: constant added to the diagonal, relative to its mean over inputs that are not always zero.
        rounds: of both steps; 0 returns the start.
        lacking: ``D`` of :func:`~.compensation.pull`; the error is then ``tr(E H Eᵀ) - 2 tr(E (W D)ᵀ)``, with ``E`` the
            difference to ``weight``.
    """
    if not rounds:
        return start
    return _Descent(weight, start, hessian, damping, lacking).after(rounds)


class _Descent:
    """Everything transposed, so that a column of the weight is contiguous in memory."""

    def __init__(
        self, weight: Tensor, start: QuantizedWeight, hessian: Tensor, damping: float, lacking: Tensor | None
    ) -> None:
        place, grid = weight.device, start.grid
        diagonal = hessian.diagonal()
        alive = diagonal[diagonal > 0]
        self._start, self._hessian = start, hessian
        self._added = float(damping * alive.mean()) if len(alive) else 1.0
        self._wanted = weight.T.contiguous()
        self._towards = None if lacking is None else lacking.T @ self._wanted
        self._goal = self._damped(self._wanted)  # what the slope would be at zero, but for its sign
        if self._towards is not None:
            self._goal += self._towards
        self._group_of = grid.group_of.to(place, torch.int64)
        self._scales = grid.scales.T.contiguous().to(place)
        self._zeros = grid.zeros.T.to(place, torch.float32).contiguous()
        self._members = [(self._group_of == group).nonzero()[:, 0] for group in range(len(self._scales))]
        self._levels = start.codes.T.to(place, torch.float32) - spread(self._zeros, self._group_of, 0)

    def after(self, rounds: int) -> QuantizedWeight:
        for _ in range(rounds):
            slope, errors = self._slope(self._scales)
            scales = self._best_scales()
            new_slope, new_errors = self._slope(scales)
            better = new_errors < errors
            self._scales = torch.where(better, scales, self._scales)
            slope = torch.where(better, new_slope, slope)
            if not self._best_codes(slope):
                break
        codes = (self._levels + spread(self._zeros, self._group_of, 0)).T
        grid = replace(self._start.grid, scales=self._scales.T.cpu().contiguous())
        return QuantizedWeight(codes.to("cpu", torch.uint8).contiguous(), grid)

    def _damped(self, vectors: Tensor) -> Tensor:
        return torch.addmm(vectors, self._hessian, vectors, beta=self._added)

    def _slope(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Half the gradient of the error, ``[in_features, out_features]``, and the error of each row."""
        error = self._levels * spread(scales, self._group_of, 0) - self._wanted
        slope = self._damped(error)
        if self._towards is None:
            return slope, torch.linalg.vecdot(error, slope, dim=0)
        slope -= self._towards
        return slope, torch.linalg.vecdot(error, slope - self._towards, dim=0)

    def _best_scales(self) -> Tensor:
        """Those with the least error for these codes, ``[groups, out_features]``, as they can be stored."""
        groups = len(self._scales)
        found = []
        for rows in torch.arange(self._levels.shape[1]).split(max(1, _SYSTEMS // groups**2)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            levels, before = self._levels[:, part], self._scales[:, part].T.double()
            matrix = levels.new_zeros(len(rows), groups, groups, dtype=torch.float64)
            for group, columns in enumerate(self._members):
                product = self._hessian[:, columns] @ levels[columns]
                product[columns] += self._added * levels[columns]
                matrix[:, group] = self._by_group(product * levels).T
            wanted = self._by_group(self._goal[:, part] * levels).T.double()
            diagonal = matrix.diagonal(dim1=1, dim2=2)
            ridge = _RIDGE * diagonal.amax(1, keepdim=True).clamp(min=1e-30).expand_as(diagonal)
            solution = torch.linalg.solve(matrix + torch.diag_embed(ridge), wanted + ridge * before)
            found.append(torch.where(solution > 0, solution, before).T)
        return storable(torch.cat(found, dim=1).float(), float_of(self._start.grid.scale_bits))

    def _by_group(self, values: Tensor) -> Tensor:
        """The sum over each group's columns, ``[groups, rows]``."""
        return torch.zeros_like(self._scales[:, : values.shape[1]]).index_add_(0, self._group_of, values)

    def _best_codes(self, slope: Tensor) -> bool:
        """Visit each column once; return whether any code changed."""
        lowest = -self._zeros
        highest = lowest + 2**self._start.grid.bits - 1
        groups = self._group_of.tolist()
        changed = False
        for start in range(0, len(slope), _BLOCK):
            end = min(start + _BLOCK, len(slope))
            strip = self._hessian[start:end].clone()
            square = strip[:, start:end]
            square.diagonal().add_(self._added)
            part, moves = slope[start:end], torch.empty_like(slope[start:end])
            for column, (level, curvature) in enumerate(
                zip(self._levels[start:end], square.diagonal().tolist(), strict=True)
            ):
                group = groups[start + column]
                scale = self._scales[group]
                best = (level - part[column] / (curvature * scale)).round_()
                best = torch.maximum(torch.minimum(best, highest[group]), lowest[group])
                torch.sub(best, level, out=moves[column]).mul_(scale)
                level.copy_(best)
                part.addr_(square[column], moves[column])
            if bool(moves.any()):
                changed = True
                slope[:start].addmm_(strip[:, :start].T, moves)
                slope[end:].addmm_(strip[:, end:].T, moves)
        return changed
