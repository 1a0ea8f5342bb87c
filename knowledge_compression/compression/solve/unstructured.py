"""Pruning of single weights by a score: which weights go, given what each is worth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from knowledge_compression.compression.base import check_sparsity, reporting
from knowledge_compression.compression.layer_reports import CompressionReport, LayerReport
from knowledge_compression.compression.solve.threshold import Cut, pieces, smallest
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, TargetLayer, Targets

SCOPES = ("global", "layer")

Score = Callable[[TargetLayer], torch.Tensor]
"""What each weight of a layer is worth, ``[out_features, in_features]``; the sign is ignored, the least goes first.

Called more than once and must give the same each time.
"""


@dataclass(frozen=True)
class Pattern:
    """``keep`` weights of every ``of`` neighbours along the inputs, e.g. 2:4, which GPUs can multiply faster."""

    keep: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``2:4``.

        Raises:
            BadInput: it is not two numbers n:m with 0 < n < m.
        """
        keep, colon, of = str(text).partition(":")
        if not (colon and keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of)):
            raise BadInput(f"pattern={text} is not of the form n:m with 0 < n < m, e.g. pattern=2:4")
        return cls(int(keep), int(of))

    def check(self, targets: Targets) -> None:
        """Refuse layers whose number of inputs the pattern does not divide."""
        for layer in targets:
            if (inputs := layer.weight.shape[1]) % self.of:
                raise BadInput(f"pattern={self} does not divide the {inputs} inputs of {layer.path}")

    def removes(self, scores: torch.Tensor) -> torch.Tensor:
        """Boolean mask ``[out, in]`` of what goes: of every group the ``of - keep`` least, among equals the first."""
        groups = scores.abs().unflatten(1, (-1, self.of))
        order = groups.argsort(dim=-1, stable=True)[..., : self.of - self.keep]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(1)

    def __str__(self) -> str:
        """As the user types it."""
        return f"{self.keep}:{self.of}"


def check_settings(sparsity: float, scope: str, pattern: str | None) -> None:
    """Refuse a sparsity outside [0, 1), a scope that does not exist, and what is not n:m."""
    check_sparsity(sparsity)
    if scope not in SCOPES:
        raise BadInput(f"scope={scope} does not exist; choose one of {', '.join(SCOPES)}")
    if pattern is not None:
        Pattern.parse(pattern)


def prune(
    method: str,
    model: Model,
    targets: Targets,
    score: Score,
    *,
    sparsity: float,
    scope: str = "global",
    pattern: str | None = None,
    cut: Cut | None = None,
) -> CompressionReport:
    """Set the weights of least score to zero, in place and in bounded memory.

    Args:
        method: name in the report.
        model: what the targets belong to.
        targets: the layers to prune.
        score: what each weight is worth.
        sparsity: share of the weights to remove, in [0, 1); ``round(sparsity * weights)`` go, as in torch's pruning.
        scope: ``global`` ranks the weights of all layers together, ``layer`` each layer's for itself.
        pattern: ``n:m`` keeps n of every m neighbouring inputs; then the sparsity is that of the pattern.
        cut: where to cut, for ``global``; found by ranking these layers where it is not given.

    Raises:
        BadInput: settings out of range, or a pattern that does not divide a layer.
    """
    check_settings(sparsity, scope, pattern)
    shape = Pattern.parse(pattern) if pattern is not None else None
    if shape:
        shape.check(targets)
    with reporting(method, model, targets) as report:
        if scope == "global" and not shape and cut is None:
            cut = smallest(lambda: (score(layer) for layer in targets), round(sparsity * targets.parameters))
        for layer in targets:
            start = time.perf_counter()
            scores, weight = score(layer), layer.weight
            # A pattern decides inside each row; else one cut over all layers, or the layer's own.
            removes = shape.removes if shape else (cut or _cut_of(scores, sparsity)).removes
            removed = 0
            for part, values in zip(pieces(scores), pieces(weight), strict=True):
                mask = removes(part)
                values.masked_fill_(mask, 0)
                removed += int(mask.sum())
            report.layers.append(LayerReport.of(layer, removed=removed, seconds=time.perf_counter() - start))
    return report


def _cut_of(scores: torch.Tensor, sparsity: float) -> Cut:
    return smallest(lambda: [scores], round(sparsity * scores.numel()))
