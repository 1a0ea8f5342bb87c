"""The same value for every layer: the baseline of every allocation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.compression.allocation.base import BITS, Allocation, Budget, Chosen
from knowledge_compression.compression.base import Method
from knowledge_compression.models import Model, Targets

if TYPE_CHECKING:
    from torch import LongTensor


@dataclass(frozen=True, kw_only=True)
class Uniform(Allocation):
    """Give every layer the sparsity of the budget, or the most bits that all layers can have within it."""

    name = "uniform"

    def choose(
        self, method: Method, budget: Budget, model: Model, targets: Targets, calibration: LongTensor | None
    ) -> Chosen:
        """The one value."""
        if budget.kind != BITS:
            return Chosen({layer.path: budget.asked for layer in targets})
        fitting = [
            value
            for value in self.options(budget)
            if sum(self.cost(method, BITS, layer, value) for layer in targets) <= budget.total
        ]
        if not fitting:
            raise self.refuse(budget, method, targets)
        return Chosen({layer.path: max(fitting) for layer in targets})


@dataclass(frozen=True)
class NoAllocation:
    """The method's own setting in every layer."""

    name = "none"
