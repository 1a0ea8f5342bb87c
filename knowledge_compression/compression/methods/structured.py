"""Structured pruning: remove whole rows or columns (Namburi et al. 2023, section 3.4: L1-structured, of the head)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from knowledge_compression.compression.base import Layerwise, check_sparsity
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import TargetLayer

NORMS = {"1": 1.0, "1.0": 1.0, "2": 2.0, "2.0": 2.0, "inf": math.inf}


@dataclass(frozen=True)
class Structured(Layerwise):
    """Set the rows or columns with the smallest norms to zero, the same share in every layer; needs no text.

    The semantics are those of ``torch.nn.utils.prune.ln_structured``; biases are kept. Among equal norms the first are
    removed.

    Attributes:
        sparsity: share of the rows or columns to remove, in [0, 1); ``round(sparsity * rows)`` are removed.
        dim: 0 for outputs (rows; in the final layer, tokens of the vocabulary), 1 for inputs (columns).
        norm: 1, 2 or inf, the norm by which rows or columns are ranked.
    """

    sparsity: float
    dim: int = 0
    norm: float | str = 1
    name = "structured"

    def __post_init__(self) -> None:
        """Refuse invalid settings before anything is loaded."""
        check_sparsity(self.sparsity)
        if self.dim not in (0, 1):
            raise BadInput(f"dim={self.dim} does not exist; choose 0 (rows: outputs) or 1 (columns: inputs)")
        if str(self.norm) not in NORMS:
            raise BadInput(f"norm={self.norm} does not exist; choose one of 1, 2, inf")

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Prune the layer in place."""
        weight = layer.weight
        norms = torch.linalg.vector_norm(weight, NORMS[str(self.norm)], dim=1 - self.dim, dtype=torch.float32)
        gone = norms.argsort(stable=True)[: round(self.sparsity * len(norms))]
        weight.index_fill_(self.dim, gone, 0)
        return LayerReport.of(layer, removed=len(gone) * weight.shape[1 - self.dim])
