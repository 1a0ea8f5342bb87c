"""Static int8 quantization: activation ranges from calibration text (Namburi et al. 2023, section 6.2, PTSQ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.compression.calibrated import Calibrated, Solved
from knowledge_compression.compression.formats.granularity import check_granularity
from knowledge_compression.compression.solve.coding import Coding
from knowledge_compression.compression.solve.int8 import int8_coding
from knowledge_compression.compression.walk.statistics import LayerInputs, Statistics
from knowledge_compression.heavy import torch
from knowledge_compression.models import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor

    from knowledge_compression.compression.formats.int8_variants import StaticInt8Linear
    from knowledge_compression.models.replaced import ReplacedLinear


class InputRange(Statistics):
    """The smallest and the largest input over all channels."""

    def __init__(self, device: torch.device) -> None:
        self.least = torch.zeros((), device=device)
        self.greatest = torch.zeros((), device=device)

    def update(self, inputs: LayerInputs) -> None:
        """Add a batch."""
        least, greatest = torch.aminmax(inputs.values.float())
        self.least, self.greatest = torch.minimum(self.least, least), torch.maximum(self.greatest, greatest)


@dataclass(frozen=True)
class Int8Static(Calibrated[InputRange]):
    """Replace the targets by int8 layers whose inputs are rounded over a range fixed by calibration.

    The range of a layer's inputs spans everything seen on the calibration text, and zero; later inputs outside it are
    clipped. A row's result does not depend on its batch.

    Attributes:
        granularity: ``per_channel`` (one scale per weight row) or ``per_tensor`` (one per weight matrix).
    """

    granularity: str = "per_channel"
    name = "int8_static"

    def __post_init__(self) -> None:
        """Refuse an unknown granularity."""
        check_granularity(self.granularity)

    @property
    def coding(self) -> Coding | None:
        """Integers with a scale per row."""
        return int8_coding(static=True) if self.granularity == "per_channel" else None

    @property
    def for_codes(self) -> str:
        """The granularity whose codes other programs can read."""
        return "compression.granularity=per_channel"

    @property
    def modules(self) -> tuple[type[ReplacedLinear], ...]:
        """Int8 layers with a range."""
        from knowledge_compression.compression.formats.int8_variants import StaticInt8Linear

        return (StaticInt8Linear,)

    def observe(self, in_features: int, device: torch.device) -> InputRange:
        """The range that all linears with one input share."""
        return InputRange(device)

    def solve(self, weight: Tensor, statistics: InputRange, heights: Sequence[int]) -> Solved:
        """Replace the linears by int8 layers with this range."""
        from knowledge_compression.compression.formats.int8_variants import StaticInt8Linear

        seen = statistics.least, statistics.greatest

        def module(layer: TargetLayer) -> StaticInt8Linear:
            return StaticInt8Linear(layer.weight, layer.bias_parameter, self.granularity, *seen)

        return Solved(module=module)
