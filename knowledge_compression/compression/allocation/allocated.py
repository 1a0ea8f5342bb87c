"""A method whose bits or sparsity differ from layer to layer, as an allocation chooses."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from knowledge_compression.compression.allocation.base import BITS, SPARSITY, Allocation, Budget, set_to
from knowledge_compression.compression.allocation.sensitivity import alone
from knowledge_compression.compression.base import Compression, Method
from knowledge_compression.compression.calibrated import Calibrated
from knowledge_compression.compression.layer_reports import CompressionReport, LayerReport
from knowledge_compression.compression.walk.statistics import BlockMethod, Observed
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import Model, TargetLayer, Targets

if TYPE_CHECKING:
    from torch import LongTensor

    from knowledge_compression.compression.walk.statistics import Statistics


class _OfItsMethod(Compression):
    """A compression with the properties of the method that it sets."""

    method: Method

    @property
    def takes_final(self) -> bool:  # type: ignore[override]
        """As the method does."""
        return self.method.takes_final

    @property
    def modules(self) -> Any:
        """Those of the method."""
        return self.method.modules

    def multiplies_in(self, model: Model) -> str | None:
        """As the method does."""
        return self.method.multiplies_in(model)


@dataclass(frozen=True)
class Allocated(_OfItsMethod):
    """A method of one step whose setting differs from layer to layer.

    Attributes:
        method: the method; its own bits or sparsity are replaced.
        allocation: chooses the bits or sparsity of each layer.
    """

    method: Method
    allocation: Allocation
    streams = False  # the value of a layer depends on all layers

    def __post_init__(self) -> None:
        """Refuse a compression of several steps, and a budget for which the method has no setting."""
        if not isinstance(self.method, Method):
            raise BadInput(
                f"allocation={self.allocation.name} sets the layers of a single method, and this "
                "compression has several steps"
            )
        if isinstance(self.method, Calibrated) and self.method.walk.tuned_tokens:
            raise BadInput(
                f"compression={self.method.name} tunes whole blocks, and allocation sets single layers; "
                "choose another compression or allocation=none"
            )
        self.allocation.budget(self.method, [])

    @property
    def name(self) -> str:  # type: ignore[override]
        """E.g. ``gptq+owl``."""
        return f"{self.method.name}+{self.allocation.name}"

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        """Whether the method or the allocation reads text."""
        return self.method.calibrated or self.allocation.measures

    @property
    def parts(self) -> Sequence[Compression]:
        """The method, with the sparsity of the budget."""
        if self.allocation.sparsity is None:
            return (self.method,)
        return (set_to(self.method, SPARSITY, self.allocation.sparsity),)

    def multiplies_in(self, model: Model) -> str | None:
        """As the method does."""
        return self.method.multiplies_in(model)

    def check_budget(self, targets: Targets) -> None:
        """Refuse bits that even the fewest for every layer exceed."""
        if self.takes_final and targets.takes_final_when_quantized:
            targets = targets.with_final()
        budget = self.allocation.budget(self.method, targets)
        if budget.kind == BITS and targets:
            least = min(self.allocation.options(budget))
            if sum(self.allocation.cost(self.method, BITS, layer, least) for layer in targets) > budget.total:
                raise self.allocation.refuse(budget, self.method, targets)

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None = None) -> CompressionReport:
        """Choose, then compress each layer with its own setting."""
        self.check_budget(targets)
        one = _Chosen(self.method, self.allocation, self.name)
        report = one.compress(model, targets, calibration)
        report.allocation = one.record
        return report


@dataclass
class _Chosen(_OfItsMethod, Method):
    """The choice and the compression, measured like every other method."""

    method: Method
    allocation: Allocation
    name: str  # type: ignore[misc]
    record: dict[str, Any] | None = field(default=None, init=False)

    def check(self, targets: Targets) -> None:
        self.method.check(targets)

    def apply(self, model: Model, targets: Targets, calibration: LongTensor | None) -> list[LayerReport]:
        if not targets:
            return []
        start = time.perf_counter()
        budget = self.allocation.budget(self.method, targets)
        chosen = self.allocation.choose(self.method, budget, model, targets, calibration)
        seconds = time.perf_counter() - start
        made = {value: set_to(self.method, budget.kind, value) for value in dict.fromkeys(chosen.values.values())}
        at = {path: made[value] for path, value in chosen.values.items()}
        if isinstance(self.method, Calibrated):
            from knowledge_compression.compression.walk.blocks import compress_blocks

            by_layer = _ByLayer(self.method, at)
            reports = compress_blocks(model, targets, calibration, by_layer, self.method.walk)
        else:
            reports = [alone(at[layer.path], layer) for layer in targets]  # type: ignore[arg-type]
        self.record = self._told(budget, chosen.values, reports) | {
            "seconds": seconds,
            "tokens": chosen.tokens,
            "measured": dict(chosen.measured),
        }
        return reports

    def _told(self, budget: Budget, values: Mapping[str, float], reports: Sequence[LayerReport]) -> dict[str, Any]:
        weights = sum(report.parameters for report in reports)
        if budget.kind == BITS:
            spent = sum(report.stored_bits for report in reports)
            reached, gap = spent / weights, (budget.total - spent) / weights
        else:
            reached = sum(report.removed for report in reports) / weights
            gap = reached - budget.asked
        return {
            "name": self.allocation.name,
            "budget": {budget.kind: budget.asked},
            "reached": reached,
            "gap": gap,
            "values": dict(values),
        }


@dataclass(frozen=True)
class _ByLayer(BlockMethod[Any]):
    """A calibrated method with a setting per layer; layers of the same inputs and setting are solved together."""

    method: Calibrated[Any]
    at: Mapping[str, Any]

    def observe(self, in_features: int, device: torch.device) -> Statistics:
        statistics: Statistics = self.method.observe(in_features, device)
        return statistics

    def prepare(self, block: Observed[Any]) -> None:
        self.method.prepare(block)

    def shrink(self, layers: Sequence[TargetLayer], statistics: Any) -> list[LayerReport]:
        reports: dict[str, LayerReport] = {}
        for method in dict.fromkeys(map(id, (self.at[layer.path] for layer in layers))):
            alike = [layer for layer in layers if id(self.at[layer.path]) == method]
            reports |= {report.path: report for report in self.at[alike[0].path].shrink(alike, statistics)}
        return [reports[layer.path] for layer in layers]
