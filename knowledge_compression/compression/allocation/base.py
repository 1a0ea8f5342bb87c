"""The base class of allocations: how many bits each layer gets, or how many weights it keeps, within one budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from pydantic import Field

from knowledge_compression.compression.base import Method, check_sparsity
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, TargetLayer, Targets

if TYPE_CHECKING:
    from torch import LongTensor

BITS, SPARSITY = "bits", "sparsity"
WIDTHS = (2, 3, 4, 8)  # bits of a code that a grid offers
_PRUNED_MOST = 0.95  # the highest sparsity of one layer, at any budget


@dataclass(frozen=True)
class Budget:
    """A budget over layers.

    Attributes:
        kind: ``bits`` or ``sparsity``, the field of a method that is set layer by layer.
        asked: mean stored bits of a weight with scales and zero points, or share of the weights to remove.
        total: bits of all layers together, or the number of weights that stay.
    """

    kind: str
    asked: float
    total: int


@dataclass(frozen=True)
class Chosen:
    """A choice for every layer.

    Attributes:
        values: bits or sparsity by layer path.
        measured: the measurements by which they were chosen, JSON-ready.
        tokens: calibration tokens that were read for it.
    """

    values: Mapping[str, float]
    measured: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Allocation(ABC):
    """A way to spread a budget; implement :meth:`choose`.

    Attributes:
        bits: mean stored bits of a weight of the target, scales and zero points counted; if ``sparsity`` is None too,
            the budget is what the method takes with its own setting.
        sparsity: share of the target's weights to remove.
    """

    bits: Annotated[float, Field(gt=0)] | None = None
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    name: ClassVar[str]
    measures: ClassVar[bool] = False  # on calibration text

    def __post_init__(self) -> None:
        """Refuse two budgets."""
        if self.bits is not None and self.sparsity is not None:
            raise BadInput("budget.bits and budget.sparsity are two budgets; set only one of them")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)

    @abstractmethod
    def choose(
        self, method: Method, budget: Budget, model: Model, targets: Targets, calibration: LongTensor | None
    ) -> Chosen:
        """The value of each layer.

        Raises:
            BadInput: no choice is within the budget.
        """

    def budget(self, method: Method, targets: Sequence[TargetLayer]) -> Budget:
        """The budget of these layers.

        Raises:
            BadInput: the method has no such setting.
        """
        has: set[str] = {one.name for one in fields(method)} if is_dataclass(method) else set()
        kind = BITS if self.bits is not None else SPARSITY if self.sparsity is not None else _kind_of(method)
        if kind is None or kind not in has or (kind == BITS and getattr(method, "grid", None) is None):
            raise BadInput(
                f"allocation={self.name} spreads bits or sparsity over layers, and compression={method.name} has no "
                "such setting; choose e.g. gptq, rtn, sparsegpt or wanda"
            )
        if getattr(method, "pattern", None) is not None:
            raise BadInput(
                f"allocation={self.name}: compression.pattern already sets the sparsity of every layer; leave it out"
            )
        weights = sum(layer.parameters for layer in targets)
        if kind == SPARSITY:
            asked = getattr(method, SPARSITY) if self.sparsity is None else self.sparsity
            return Budget(kind, asked, weights - round(asked * weights))
        if self.bits is None:
            total = sum(stored_bits(method, layer) for layer in targets)
            return Budget(kind, total / max(weights, 1), total)
        return Budget(kind, self.bits, int(self.bits * weights + 1e-6))

    def cost(self, method: Method, kind: str, layer: TargetLayer, value: float) -> int:
        """The share of the budget that a layer takes at a value, in the units of the budget."""
        if kind == SPARSITY:
            return layer.parameters - round(value * layer.parameters)
        return stored_bits(set_to(method, kind, value), layer)

    def options(self, budget: Budget) -> list[float]:
        """The values that a layer can have."""
        if budget.kind == BITS:
            return [float(bits) for bits in WIDTHS]
        steps = [budget.asked + step / 10 for step in (-2, -1, 0, 1, 2)]
        return sorted({min(max(step, 0.0), max(_PRUNED_MOST, budget.asked)) for step in steps})

    def refuse(self, budget: Budget, method: Method, targets: Sequence[TargetLayer]) -> BadInput:
        """The error for a budget that cannot be met."""
        weights = sum(layer.parameters for layer in targets)
        value = WIDTHS[0] if budget.kind == BITS else _PRUNED_MOST
        least = sum(self.cost(method, budget.kind, layer, value) for layer in targets)
        if budget.kind == BITS:
            return BadInput(
                f"budget.bits={budget.asked:.6g} cannot be met: with its scales and zero points, compression="
                f"{method.name} takes at least {least / weights:.4g} bits per weight here; larger groups have fewer "
                "scales"
            )
        return BadInput(
            f"budget.sparsity={budget.asked} cannot be met, because no layer is pruned to more than {_PRUNED_MOST}"
        )


def set_to(method: Method, kind: str, value: float) -> Method:
    """A method with another value of its bits or sparsity."""
    made: Method = replace(cast(Any, method), **{kind: int(value) if kind == BITS else value})
    return made


def stored_bits(method: Any, layer: TargetLayer) -> int:
    """The bits that a layer will take with a method, with scales and zero points.

    Raises:
        BadInput: the method cannot tell beforehand.
    """
    if not hasattr(method, "stored_bits"):
        raise BadInput(
            f"compression={method.name} cannot tell beforehand how many bits it stores; use budget.bits with rtn, "
            "gptq, awq or hqq"
        )
    return int(method.stored_bits(layer))


def _kind_of(method: Method) -> str | None:
    """The field of a method that an allocation sets."""
    if getattr(method, "grid", None) is not None:
        return BITS
    return SPARSITY if hasattr(method, SPARSITY) else None


def to_the_weight(shares: Mapping[str, float], targets: Sequence[TargetLayer], stay: int) -> dict[str, float]:
    """Sparsities with which the layers together keep exactly ``stay`` weights, each layer as near to its share as
    possible.

    Args:
        shares: the sparsity of each layer, in [0, 1].
        targets: the layers.
        stay: number of weights that all of them keep together.
    """
    sizes = {layer.path: layer.parameters for layer in targets}
    kept = {path: (1 - shares[path]) * size for path, size in sizes.items()}
    scale = stay / max(sum(kept.values()), 1e-9)
    for _ in range(50):  # a layer keeps no more than it has; the others then keep more
        wanted = {path: min(value * scale, sizes[path]) for path, value in kept.items()}
        missing = stay - sum(wanted.values())
        free = sum(value * scale for path, value in kept.items() if value * scale < sizes[path])
        if abs(missing) < 0.5 or not free:
            break
        scale *= 1 + missing / free
    counts = {path: int(value) for path, value in wanted.items()}
    order = sorted(wanted, key=lambda path: counts[path] - wanted[path])
    missing = stay - sum(counts.values())
    while missing > 0:
        for path in order:
            if missing > 0 and counts[path] < sizes[path]:
                counts[path] += 1
                missing -= 1
    return {path: 1 - counts[path] / size for path, size in sizes.items()}
