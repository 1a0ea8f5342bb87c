"""Structured pruning: whole rows or columns go (Namburi et al. 2023, section 3.4: L1-structured of the head)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import LongTensor

from knowledge_compression.compression.base import check_sparsity, reporting
from knowledge_compression.compression.layer_reports import CompressionReport, LayerReport
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Targets

NORMS = {"1": 1.0, "1.0": 1.0, "2": 2.0, "2.0": 2.0, "inf": math.inf}


@dataclass(frozen=True)
class Structured:
    """Set the rows or columns of smallest norm to zero, in each layer the same share.

    The semantics are those of ``torch.nn.utils.prune.ln_structured``; a bias stays. Among equal norms the first go.

    Attributes:
        sparsity: share of the rows or columns to remove, in [0, 1); ``round(sparsity * rows)`` go.
        dim: 0 for outputs (rows; of the final layer these are words of the vocabulary), 1 for inputs (columns).
        norm: 1, 2 or inf, the norm that a row or column is ranked by.
    """

    sparsity: float
    dim: int = 0
    norm: float | str = 1
    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse settings that do not exist before anything is loaded."""
        check_sparsity(self.sparsity)
        if self.dim not in (0, 1):
            raise BadInput(f"dim={self.dim} does not exist; choose 0 (rows: outputs) or 1 (columns: inputs)")
        if str(self.norm) not in NORMS:
            raise BadInput(f"norm={self.norm} does not exist; choose one of 1, 2, inf")

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None) -> CompressionReport:
        """Prune the targets in place."""
        with reporting("structured", model, targets) as report:
            for layer in targets:
                start, weight = time.perf_counter(), layer.weight
                norms = torch.linalg.vector_norm(weight, NORMS[str(self.norm)], dim=1 - self.dim, dtype=torch.float32)
                gone = norms.argsort(stable=True)[: round(self.sparsity * len(norms))]
                weight.index_fill_(self.dim, gone, 0)
                report.layers.append(
                    LayerReport.of(
                        layer,
                        removed=len(gone) * weight.shape[1 - self.dim],
                        seconds=time.perf_counter() - start,
                    )
                )
        return report
