"""Compressions one after the other on the same layers, e.g. prune, then quantize."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from torch import LongTensor

from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.layer_reports import CompressionReport, followed_by
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Targets


@dataclass(frozen=True)
class Pipeline:
    """Several compressions in the order given.

    Attributes:
        steps: the compressions; pruning goes before quantization, whose zeros stay zeros.
    """

    steps: Sequence[Compression]

    def __post_init__(self) -> None:
        """Refuse an empty list."""
        if not self.steps:
            raise BadInput("compression.steps is empty; name at least one compression")

    @property
    def calibrated(self) -> bool:
        """Whether any step needs calibration text."""
        return any(step.calibrated for step in self.steps)

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None) -> CompressionReport:
        """Do every step in place and add up what they report."""
        return reduce(followed_by, [step.compress(model, targets, calibration) for step in self.steps])
