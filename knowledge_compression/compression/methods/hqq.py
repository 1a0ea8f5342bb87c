"""HQQ: zero points fitted to the weights by half-quadratic splitting, without text (Badri & Shaji 2023).

Written here because the published library inserts layers without a floating-point ``.weight`` and needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from knowledge_compression.building import Positive
from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.grid import SCALE_BITS, Grid
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import TargetLayer, Targets

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Hqq(Layerwise):
    """Round to a grid whose real-valued zero points minimise a norm that discounts outliers; needs no text.

    Minimises ``sum |W - s (q - z)|^p`` with p < 1 over z: the errors are shrunk by the p-norm's proximal operator (eq.
    5), then z is set to the mean of the remainder (eq. 8), and the penalty is multiplied by ``kappa``.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: input columns that share a scale and a zero point; None takes the whole row.
        p, beta, kappa, iterations: the solver's norm, initial penalty, growth of the penalty, and maximum number of
            steps.
    """

    bits: int = 4
    group_size: int | None = 64
    p: float = 0.7
    beta: Annotated[float, Field(gt=0)] = 10.0
    kappa: Annotated[float, Field(gt=0)] = 1.01
    iterations: Positive = 20
    name = "hqq"

    def __post_init__(self) -> None:
        """Refuse a norm for which this proximal operator is not defined."""
        if not 0.0 < self.p <= 1.0:
            raise BadInput(
                f"compression.p={self.p} is not a norm that HQQ can minimise; it must lie in (0, 1], e.g. 0.7"
            )
        _ = self.grid

    @property
    def grid(self) -> Grid:
        """The grid of these settings; its zero points become real numbers."""
        return Grid(self.bits, self.group_size)

    def stored_bits(self, layer: TargetLayer) -> int:
        """The bits that a layer will take, with scales and zero points."""
        rows, columns = layer.weight.shape
        return int(rows * (columns * self.bits + 2 * SCALE_BITS * (columns // self.grid.width(columns))))

    def check(self, targets: Targets) -> None:
        """Refuse groups that do not divide a layer."""
        self.grid.check(targets)

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Quantize the layer in place."""
        weight = layer.weight
        groups = weight.float().unflatten(1, (-1, self.grid.width(weight.shape[1])))
        weight.copy_(self.rounded(groups, self.grid).flatten(1))
        scales_and_zeros = 2 * groups[..., 0].numel()
        return LayerReport.of(layer, bits=float(self.bits), overhead_bits=SCALE_BITS * scales_and_zeros)

    def rounded(self, weight: Tensor, grid: Grid) -> Tensor:
        """The weight on its fitted grid, with one scale and zero point for each vector along the last dimension.

        The solver stops when a step no longer reduces the error summed over the whole weight.
        """
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        span = high - low
        scales = torch.where(span > 0, span / grid.top, 1.0).half().float().clamp(min=2.0**-24)
        zeros = (-low / scales).half().float()
        best, least, beta = weight, torch.inf, self.beta
        for _ in range(self.iterations + 1):
            codes = torch.clamp(torch.round(weight / scales + zeros), 0, grid.top)
            read = scales * (codes - zeros)
            error = float((weight - read).abs().mean())
            if error >= least:
                break
            best, least = read, error
            large = self._shrunk(weight - read, beta)
            zeros = (codes - (weight - large) / scales).mean(-1, keepdim=True).half().float()
            beta *= self.kappa
        return best

    def _shrunk(self, error: Tensor, beta: float) -> Tensor:
        """The generalised soft threshold: the proximal operator of the p-norm."""
        magnitude = error.abs()
        return error.sign() * torch.relu(magnitude - magnitude.clamp(min=1e-12).pow(self.p - 1) / beta)
