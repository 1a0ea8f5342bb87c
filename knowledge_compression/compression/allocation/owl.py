"""Outlier-weighed layerwise sparsity (OWL, Yin et al. 2024): blocks with more outliers keep more weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from knowledge_compression.compression.allocation.base import BITS, Allocation, Budget, Chosen, to_the_weight
from knowledge_compression.compression.base import Method
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.methods.wanda import InputPower
from knowledge_compression.compression.walk.statistics import BlockMethod, WalkSettings
from knowledge_compression.heavy import torch
from knowledge_compression.models import Model, TargetLayer, Targets

if TYPE_CHECKING:
    from torch import LongTensor


@dataclass(frozen=True, kw_only=True)
class Owl(Allocation):
    """The sparsity of a block falls, and its bits rise, with its share of outliers.

    A weight is an outlier where ``|w| ‖x‖`` exceeds ``outlier`` times its mean over the layer (section 3.2); the shares
    of a block's layers are averaged by their size. Sparsities fall linearly with the share over a span of ``2 spread``
    around the budget (section 3.3), and the layers together keep exactly the budget. For a budget of bits, the blocks
    with the largest shares get the next wider codes until the budget is spent (section 4.5).

    Attributes:
        outlier: the factor M; the paper uses 5 and 7.
        spread: half the span, lambda; the paper uses 0.08.
    """

    outlier: Annotated[float, Field(gt=0)] = 5.0
    spread: Annotated[float, Field(ge=0, lt=1)] = 0.08
    name = "owl"
    measures = True

    def choose(
        self, method: Method, budget: Budget, model: Model, targets: Targets, calibration: LongTensor | None
    ) -> Chosen:
        """Count the outliers of every block, and spread the budget accordingly."""
        from knowledge_compression.compression.walk.blocks import compress_blocks

        counts = _Counts(self.outlier, {})
        compress_blocks(model, targets, calibration, counts, WalkSettings(true_sequential=True))
        shares = _of_blocks(counts.shares, targets)
        tokens = 0 if calibration is None else calibration.numel()
        values = self.spread_by(shares, method, budget, targets)
        return Chosen(values, {"outliers": shares}, tokens)

    def spread_by(
        self, shares: Mapping[str, float], method: Method, budget: Budget, targets: Sequence[TargetLayer]
    ) -> Mapping[str, float]:
        """The value of each layer, by its block's share of outliers."""
        low, high = min(shares.values()), max(shares.values())
        if budget.kind == BITS:
            return self._widened(shares, method, budget, targets)
        span = (high - low) or 1.0
        places = {path: (share - low) / span if high > low else 0.5 for path, share in shares.items()}
        weights = sum(layer.parameters for layer in targets)
        mean = sum(places[layer.path] * layer.parameters for layer in targets) / weights
        wanted = {path: budget.asked - 2 * self.spread * (place - mean) for path, place in places.items()}
        return to_the_weight({p: min(max(s, 0.0), 1.0) for p, s in wanted.items()}, targets, budget.total)

    def _widened(
        self, shares: Mapping[str, float], method: Method, budget: Budget, targets: Sequence[TargetLayer]
    ) -> Mapping[str, float]:
        options = self.options(budget)
        cost = {(x.path, v): self.cost(method, BITS, x, v) for x in targets for v in options}
        fitting = [v for v in options if sum(cost[x.path, v] for x in targets) <= budget.total]
        if not fitting:
            raise self.refuse(budget, method, targets)
        values = {layer.path: max(fitting) for layer in targets}
        left = budget.total - sum(cost[path, value] for path, value in values.items())
        wider = next((v for v in options if v > max(fitting)), max(fitting))
        for layer in sorted(targets, key=lambda layer: -shares[layer.path]):
            more = cost[layer.path, wider] - cost[layer.path, values[layer.path]]
            if more <= left:
                values[layer.path], left = wider, left - more
        return values


@dataclass(frozen=True)
class _Counts(BlockMethod[InputPower]):
    """Counts outliers in a walk that changes no weight."""

    outlier: float
    shares: dict[str, float]

    def observe(self, in_features: int, device: torch.device) -> InputPower:
        """Mean squares of the inputs."""
        return InputPower(in_features, device)

    def shrink(self, layers: Sequence[TargetLayer], statistics: InputPower) -> list[LayerReport]:
        """Count."""
        for layer in layers:
            sizes = layer.weight.float().abs() * statistics.mean.sqrt()
            self.shares[layer.path] = float((sizes > self.outlier * sizes.mean()).float().mean())
        return [LayerReport.of(layer) for layer in layers]


def _of_blocks(shares: Mapping[str, float], targets: Sequence[TargetLayer]) -> dict[str, float]:
    """The share of outliers in each layer's block: the mean over the block's layers, weighted by their size."""
    blocks: dict[tuple[str, int | None], list[TargetLayer]] = {}
    for layer in targets:
        stack = "" if layer.block is None else layer.path.split(f".{layer.block}.")[0]
        blocks.setdefault((stack or layer.path, layer.block), []).append(layer)
    found: dict[str, float] = {}
    for layers in blocks.values():
        outliers = sum(shares[layer.path] * layer.parameters for layer in layers)
        found |= dict.fromkeys((x.path for x in layers), outliers / sum(x.parameters for x in layers))
    return found
