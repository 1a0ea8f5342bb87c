"""Several compressions in succession on the same layers, e.g. prune, then quantize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.layer_reports import CompressionReport, followed_by
from knowledge_compression.compression.solve.coding import Coding
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Targets

if TYPE_CHECKING:
    from torch import LongTensor


@dataclass(frozen=True)
class Pipeline(Compression):
    """Several compressions in the order given.

    Attributes:
        steps: the compressions; prune before quantizing, because quantization keeps zeros.
    """

    steps: Sequence[Compression]
    streams = False  # each step would need its own pass over the checkpoint

    def __post_init__(self) -> None:
        """Refuse an empty list."""
        if not self.steps:
            raise BadInput("compression.steps is empty; name at least one compression")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The names of the steps, e.g. ``magnitude+int8_dynamic``."""
        return "+".join(step.name for step in self.steps)

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        """Whether any step needs calibration text."""
        return any(step.calibrated for step in self.steps)

    @property
    def reshapes(self) -> bool:
        """Whether any step makes the network smaller."""
        return any(step.reshapes for step in self.steps)

    @property
    def coding(self) -> Coding | None:
        """The coding of the last step."""
        return self.steps[-1].coding

    @property
    def for_codes(self) -> str:
        """The coding of the last step."""
        return self.steps[-1].for_codes

    @property
    def parts(self) -> Sequence[Compression]:
        """The steps."""
        return [part for step in self.steps for part in step.parts]

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None = None) -> CompressionReport:
        """Apply every step in place and combine the reports."""
        return reduce(followed_by, [step.compress(model, targets, calibration) for step in self.steps])
