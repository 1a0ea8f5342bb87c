"""What an allocation is: which layer gets how many bits, or keeps how many weights, within one budget."""

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
_PRUNED_MOST = 0.95  # of one layer, whatever the budget of all


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
        measured: by what they were chosen, JSON-ready.
        tokens: calibration tokens that were read for it.
    """

    values: Mapping[str, float]
    measured: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Allocation(ABC):
    """A way to spread a budget; implement :meth:`choose`.

    Attributes:
        bits: mean stored bits of a weight of the target, scales and zero points counted; None together with
            ``sparsity`` spends what the method takes as it is set.
        sparsity: share of the target's weights to remove.
    """

    bits: Annotated[float, Field(gt=0)] | None = None
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    name: ClassVar[str]
    measures: ClassVar[bool] = False  # on calibration text

    def __post_init__(self) -> None:
        """Refuse two budgets."""
        if self.bits is not None and self.sparsity is not None:
            raise BadInput("budget.bits and budget.sparsity are two budgets; give one of them")
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
            raise BadInput(f"allocation={self.name}: a pattern sets the sparsity of every layer; leave it out")
        weights = sum(layer.parameters for layer in targets)
        if kind == SPARSITY:
            asked = getattr(method, SPARSITY) if self.sparsity is None else self.sparsity
            return Budget(kind, asked, weights - round(asked * weights))
        if self.bits is None:
            total = sum(stored_bits(method, layer) for layer in targets)
            return Budget(kind, total / max(weights, 1), total)
        return Budget(kind, self.bits, int(self.bits * weights + 1e-6))

    def cost(self, method: Method, kind: str, layer: TargetLayer, value: float) -> int:
        """What a layer costs of the budget at a value."""
        if kind == SPARSITY:
            return layer.parameters - round(value * layer.parameters)
        return stored_bits(set_to(method, kind, value), layer)

    def options(self, budget: Budget) -> list[float]:
        """The values that a layer can be given."""
        if budget.kind == BITS:
            return [float(bits) for bits in WIDTHS]
        steps = [budget.asked + step / 10 for step in (-2, -1, 0, 1, 2)]
        return sorted({min(max(step, 0.0), max(_PRUNED_MOST, budget.asked)) for step in steps})

    def refuse(self, budget: Budget, method: Method, targets: Sequence[TargetLayer]) -> BadInput:
        """The line that says that a budget cannot be met."""
        weights = sum(layer.parameters for layer in targets)
        value = WIDTHS[0] if budget.kind == BITS else _PRUNED_MOST
        least = sum(self.cost(method, budget.kind, layer, value) for layer in targets)
        if budget.kind == BITS:
            return BadInput(
                f"budget.bits={budget.asked:.6g} cannot be met: with its scales and zero points, compression="
                f"{method.name} takes {least / weights:.4g} bits a weight or more here; larger groups have fewer scales"
            )
        return BadInput(f"budget.sparsity={budget.asked} cannot be met by layers of at most {_PRUNED_MOST}")


def set_to(method: Method, kind: str, value: float) -> Method:
    """A method with another value of its bits or sparsity."""
    made: Method = replace(cast(Any, method), **{kind: int(value) if kind == BITS else value})
    return made


def stored_bits(method: Any, layer: TargetLayer) -> int:
    """What a layer will take at a method's bits, scales and zero points counted.

    Raises:
        BadInput: the method does not say.
    """
    if not hasattr(method, "stored_bits"):
        raise BadInput(
            f"compression={method.name} does not say beforehand how much it stores; budget.bits takes rtn, gptq, awq "
            "or hqq"
        )
    return int(method.stored_bits(layer))


def _kind_of(method: Method) -> str | None:
    """What a method is set by."""
    if getattr(method, "grid", None) is not None:
        return BITS
    return SPARSITY if hasattr(method, SPARSITY) else None


def to_the_weight(shares: Mapping[str, float], targets: Sequence[TargetLayer], stay: int) -> dict[str, float]:
    """Sparsities whose layers keep exactly so many weights: each near its share, the remainder to the largest parts.

    Args:
        shares: the sparsity of each layer, in [0, 1].
        targets: the layers.
        stay: weights that stay in all of them.
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
