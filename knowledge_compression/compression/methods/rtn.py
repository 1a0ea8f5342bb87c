"""Round to nearest: the plain rounding with which every calibrated quantization is compared."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.coding import Coding
from knowledge_compression.compression.solve.grid import Grid, plainly_rounded
from knowledge_compression.models import TargetLayer, Targets


@dataclass(frozen=True)
class Rtn(Layerwise):
    """Round every weight to the nearest point of its row's (or group's) grid; needs no text.

    Attributes:
        bits, group_size, symmetric, clip, scale_bits: the grid
            (:class:`~knowledge_compression.compression.solve.grid.Grid`).
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False
    clip: str = "minmax"
    scale_bits: int = 32
    name = "rtn"

    def __post_init__(self) -> None:
        """Refuse an invalid grid before anything is loaded."""
        _ = self.grid

    @property
    def grid(self) -> Grid:
        """The grid of these settings."""
        return Grid(self.bits, self.group_size, self.symmetric, self.clip, self.scale_bits)

    @property
    def coding(self) -> Coding:
        """Integers on the grid."""
        return self.grid.coding()

    def stored_bits(self, layer: TargetLayer) -> int:
        """The bits that a layer will take, with scales and zero points."""
        return self.grid.stored_bits(layer)

    def check(self, targets: Targets) -> None:
        """Refuse groups that do not fit a layer."""
        self.grid.check(targets, whole=False)

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Quantize the layer in place."""
        rounded = plainly_rounded(layer.weight, self.grid)
        rounded.put_into(layer)
        return rounded.report(layer)
