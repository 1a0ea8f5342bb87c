"""The types of GGUF files with an importance matrix: inputs that are large on a text are rounded with more care.

As in ``llama-quantize --imatrix`` each input's importance is the mean of its squares on the calibration text. The
squared error by which a block's scales and codes are chosen is weighted by it: for inputs that do not vary together,
that is the squared error of the layer's output.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.compression.calibrated import Calibrated
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.methods.gguf import check_fitting, check_type, rounded, types_of
from knowledge_compression.compression.methods.wanda import InputPower
from knowledge_compression.models import TargetLayer, Targets

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Imatrix(Calibrated[InputPower]):
    """Round to a GGUF type or mixture by errors weighted with the mean squares of the inputs.

    Attributes:
        type: as for ``compression=gguf``; ``q8_0`` and ``mxfp4`` ignore the importance.
    """

    type: str = "q4_k"
    name = "imatrix"

    def __post_init__(self) -> None:
        """Refuse a type that does not exist before anything is loaded."""
        check_type(self.type)

    def check(self, targets: Targets) -> None:
        """Refuse layers whose rows are not whole blocks, and models to which a mixture does not apply."""
        check_fitting(self.type, targets)

    def observe(self, in_features: int, device: torch.device) -> InputPower:
        """The mean squares that all linears with one input share."""
        return InputPower(in_features, device)

    def shrink(self, layers: Sequence[TargetLayer], statistics: InputPower) -> list[LayerReport]:
        """Round each layer to its own type; a layer that no token reached is rounded without importance."""
        chosen, power = types_of(self.type, layers), statistics.mean
        seen = bool((power > 0).any())
        reports = []
        for layer in layers:
            start = time.perf_counter()
            report = rounded(layer, chosen(layer), power if seen else None)
            report.fallbacks += [] if seen else ["no_input"]
            report.seconds = time.perf_counter() - start
            reports.append(report)
        return reports
