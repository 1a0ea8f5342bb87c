"""AWQ: weights that multiply large activations are rounded on a finer grid (Lin et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from knowledge_compression.compression.calibrated import Calibrated, Solved
from knowledge_compression.compression.solve.coding import Coding
from knowledge_compression.compression.solve.grid import SCALE_BITS, Grid, plainly_rounded
from knowledge_compression.compression.solve.hessian import Hessian
from knowledge_compression.compression.walk.statistics import Divisible, LayerInputs, Observed
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.identity import ADDED
from knowledge_compression.models import TargetLayer, Targets

if TYPE_CHECKING:
    from torch import Tensor


class InputSizes(Hessian, Divisible):
    """Second moments of the inputs, which weight a layer's output error, and the mean magnitude of each channel."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._magnitudes = torch.zeros(in_features, device=device)
        self._tokens = 0

    def update(self, inputs: LayerInputs) -> None:
        """Add a batch."""
        super().update(inputs)
        self._magnitudes += inputs.values.float().abs().sum(0)
        self._tokens += len(inputs.values)

    @property
    def magnitudes(self) -> Tensor:
        """The mean magnitude of each input channel, float32 ``[in_features]``."""
        return self._magnitudes / max(self._tokens, 1)

    def divide(self, factors: Tensor) -> None:
        """Turn into the statistics of divided inputs."""
        self.matrix.div_(factors).div_(factors[:, None])
        self._magnitudes /= factors


@dataclass(frozen=True)
class Awq(Calibrated[InputSizes]):
    """Multiply each input channel's weights by a power of its mean activation, round, and divide by it again.

    Linears that read the same inputs share the power: of ``steps`` values between 0 (plain rounding) and 1, the one
    with the least output error on the calibration text (eq. 4 and 5).

    With ``fold``, as in the published code, the inputs are divided rather than the rounded weights: by the norm or
    linear layer that produces them (``walk/folding.py``). The weights are then integers that other programs can load.
    Inputs that no such layer can divide get no factors, and the report names a fallback. Without ``fold``, the rounded
    weights are divided by the factors, which gives the same product and leaves no integers.

    Attributes:
        bits, group_size, symmetric: the grid (:class:`~knowledge_compression.compression.solve.grid.Grid`).
        steps: number of powers tried.
        fold: whether the preceding norm or linear layer takes the factors.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    steps: int = 20
    fold: bool = field(default=False, metadata=ADDED)
    name = "awq"

    def __post_init__(self) -> None:
        """Refuse a number of powers below one."""
        if self.steps < 1:
            raise BadInput(f"compression.steps={self.steps} is not a number of powers to try; choose e.g. 20")
        _ = self.grid

    @property
    def grid(self) -> Grid:
        """The grid of these settings."""
        return Grid(self.bits, self.group_size, self.symmetric)

    def stored_bits(self, layer: TargetLayer) -> int:
        """The bits that a layer will take, with scales and zero points."""
        factors = 0 if self.fold else SCALE_BITS * int(layer.weight.shape[1])
        return self.grid.stored_bits(layer) + factors

    def check(self, targets: Targets) -> None:
        """Refuse groups that do not fit a layer."""
        self.grid.check(targets, whole=False)

    @property
    def coding(self) -> Coding | None:
        """Integers, if the weights do not contain the factors."""
        return self.grid.coding() if self.fold else None

    @property
    def for_codes(self) -> str:
        """What leaves integers."""
        return "compression.fold=true"

    def observe(self, in_features: int, device: torch.device) -> InputSizes:
        """The statistics that all linears with one input share."""
        return InputSizes(in_features, device)

    def prepare(self, block: Observed[InputSizes]) -> None:
        """Move the factors of all inputs of a block into the layers that produce these inputs."""
        if self.fold:
            from knowledge_compression.compression.walk.folding import fold

            fold(block, lambda weight, seen, entry: self.factors(weight, seen.matrix, seen.magnitudes, entry))

    def solve(self, weight: Tensor, statistics: InputSizes, heights: Sequence[int]) -> Solved:
        """Round the weight with the power that gives the least output error."""
        if self.fold:
            return self._folded(weight, statistics)
        inputs = weight.shape[1]
        width = self.grid.width(inputs)
        dead = bool((statistics.magnitudes <= 0).any())
        a_scale = SCALE_BITS + (0 if self.symmetric else self.bits)
        return Solved(
            weight=self.rounded(weight, statistics.matrix, statistics.magnitudes),
            plain=plainly_rounded(weight, self.grid).dequantize().to(weight),
            bits=float(self.bits),
            overhead_bits=(math.ceil(inputs / width) * a_scale, SCALE_BITS * inputs),
            fallbacks=["dead_input"] * dead + ["short_group"] * (inputs % width > 0),
        )

    def _folded(self, weight: Tensor, statistics: InputSizes) -> Solved:
        """Round a weight that has been multiplied by the factors."""
        factors = 1.0 if statistics.factors is None else statistics.factors
        return Solved(
            quantized=plainly_rounded(weight, self.grid),
            plain=plainly_rounded(weight / factors, self.grid).dequantize().to(weight) * factors,
            fallbacks=["dead_input"] * bool((statistics.magnitudes <= 0).any())
            + ["no_place_for_factors"] * (statistics.factors is None),
            factors_in=statistics.divided_by,
        )

    def rounded(self, weight: Tensor, hessian: Tensor, magnitudes: Tensor) -> Tensor:
        """The algorithm itself, on tensors alone.

        Args:
            weight: float32 ``[out_features, in_features]``.
            hessian: mean second moments of the inputs, ``[in_features, in_features]``.
            magnitudes: mean magnitude of each input, ``[in_features]``; a dead input keeps the factor 1.

        Returns:
            The rounded weight, of the same shape.
        """
        if not bool((magnitudes > 0).any()):
            return plainly_rounded(weight, self.grid).dequantize().to(weight)
        factors = self.factors(weight, hessian, magnitudes)
        return self.grid.nearest(weight * factors) / factors

    def factors(self, weight: Tensor, hessian: Tensor, magnitudes: Tensor, entry: Tensor | None = None) -> Tensor:
        """The best factors.

        Args:
            weight, hessian, magnitudes: as in :meth:`rounded`.
            entry: the index of each input's factor, int64 ``[in_features]``; by default each input has its own.

        Returns:
            Float32, ``[in_features]``, or one more than the largest entry.
        """
        if entry is None:
            entry = torch.arange(len(magnitudes), device=magnitudes.device)
        count = torch.bincount(entry)
        shared = torch.zeros(len(count), device=magnitudes.device).index_add_(0, entry, magnitudes) / count.clamp(min=1)
        alive = shared > 0
        best, least = torch.ones_like(shared), torch.inf
        if not bool(alive.any()):
            return best
        for step in range(self.steps):
            factors = torch.where(alive, shared, 1.0).pow(step / self.steps).clamp(min=1e-4)
            factors = torch.where(alive, factors / (factors[alive].max() * factors[alive].min()).sqrt(), 1.0)
            each = factors[entry]
            error = self.grid.nearest(weight * each) / each - weight
            loss = float(((error @ hessian) * error).sum())
            if loss < least:
                best, least = factors, loss
        return best
