"""Wanda: each output keeps the weights that, times the size of their inputs, are largest (Sun et al. 2024, eq. 1)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import LongTensor, Tensor

from knowledge_compression.compression.base import check_sparsity
from knowledge_compression.compression.layer_reports import CompressionReport, LayerReport
from knowledge_compression.compression.solve.unstructured import Pattern
from knowledge_compression.compression.walk.blocks import LayerInputs, compress_calibrated
from knowledge_compression.models import Model, TargetLayer, Targets


class InputPower:
    """Mean square of each input feature over the tokens of the calibration text."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, device=device)
        self._tokens = 0

    def update(self, inputs: LayerInputs) -> None:
        """Take in a batch."""
        self._sum += inputs.values.float().square().sum(0)
        self._tokens += len(inputs.values)

    @property
    def mean(self) -> Tensor:
        """Float32 ``[in_features]``."""
        return self._sum / max(self._tokens, 1)


@dataclass(frozen=True)
class Wanda:
    """Remove the weights of least ``|w| ‖x‖`` from every output row; the rest stay as they are.

    Attributes:
        sparsity: share of each row's weights to remove, in [0, 1).
        pattern: ``n:m``, e.g. ``2:4``: keep n of every m neighbouring inputs; the sparsity is then that of the pattern.
        forward_dtype, device: see ``walk.blocks.compress_blocks``.
    """

    sparsity: float
    pattern: str | None = None
    forward_dtype: str = "auto"
    device: str | None = None
    calibrated: ClassVar[bool] = True

    @property
    def shape(self) -> Pattern | None:
        """The pattern that was asked for, if any."""
        return Pattern.parse(self.pattern) if self.pattern is not None else None

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None) -> CompressionReport:
        """Prune the targets in place."""
        check_sparsity(self.sparsity)
        if self.shape:
            self.shape.check(targets)
        return compress_calibrated("wanda", self, model, targets, calibration)

    def observe(self, in_features: int, device: torch.device) -> InputPower:
        """The norms that all linears with one input share."""
        return InputPower(in_features, device)

    def shrink(self, layers: Sequence[TargetLayer], statistics: InputPower) -> list[LayerReport]:
        """Prune each linear by the norms of its inputs."""
        power = statistics.mean
        fallbacks = ["dead_input"] if bool((power == 0).any()) else []
        reports = []
        for layer in layers:
            start = time.perf_counter()
            mask = self.removes(layer.weight, power)
            layer.weight.masked_fill_(mask, 0)
            reports.append(
                LayerReport.of(
                    layer,
                    removed=int(mask.sum()),
                    fallbacks=list(fallbacks),
                    seconds=time.perf_counter() - start,
                )
            )
        return reports

    def removes(self, weight: Tensor, power: Tensor) -> Tensor:
        """The algorithm itself: boolean mask ``[out, in]`` of what goes, given the inputs' mean squares ``[in]``."""
        scores = weight.float().abs() * power.sqrt()
        if self.shape:
            return self.shape.removes(scores)
        order = scores.argsort(dim=1, stable=True)[:, : round(self.sparsity * weight.shape[1])]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)
