"""The base class of methods that make the network itself smaller: fewer blocks, heads or channels, not zeros.

Such a method decides what to drop; the smaller network is then built from a smaller configuration
(:mod:`knowledge_compression.models.reshaped`), so that it runs faster, takes less memory, and is saved as an ordinary
checkpoint that stock transformers loads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from knowledge_compression.compression.base import Compression, Method
from knowledge_compression.compression.layer_reports import CompressionReport, LayerReport, SmallerReport
from knowledge_compression.compression.solve.grid import quantized_weight
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Targets
from knowledge_compression.models.reshaped import Smaller, built, changed_settings, parts_of, put_in_place
from knowledge_compression.models.targets import linear_layers

if TYPE_CHECKING:
    from torch import LongTensor, Tensor


@dataclass(frozen=True)
class Cut:
    """The decision of a method.

    Attributes:
        smaller: the smaller architecture.
        state: its tensors by their names in the new network.
        removed: how many weights of each layer are dropped, by the layer's former path.
        layers: reports on layers that the method also changed in another way, by their former path.
        measured: the measurements by which it chose, JSON-ready.
    """

    smaller: Smaller
    state: Mapping[str, Tensor]
    removed: Mapping[str, int]
    layers: Mapping[str, LayerReport] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)


class Reshaping(Method):
    """A method that makes the architecture smaller: implement :meth:`cut` and :meth:`plan`."""

    streams = False  # the configuration changes with the weights

    @property
    def reshapes(self) -> bool:
        """Yes."""
        return True

    @abstractmethod
    def plan(self, targets: Targets) -> Mapping[str, float]:
        """The share of each layer that will remain, in [0, 1], by path; an average where it depends on the text.

        Raises:
            BadInput: the method cannot drop these targets, or the smaller network could not be loaded. The network may
                be on the meta device.
        """

    @abstractmethod
    def cut(self, model: Model, targets: Targets, calibration: LongTensor | None) -> Cut:
        """Decide what to drop, and return the remaining tensors."""

    def check(self, targets: Targets) -> None:
        """Refuse targets that cannot be made smaller."""
        if targets:
            self.plan(targets)

    def apply(self, model: Model, targets: Targets, calibration: LongTensor | None) -> list[LayerReport]:
        """Decide, then replace the network by the smaller one; the targets then hold the layers that remain."""
        raise NotImplementedError("a method that changes the architecture also reports on it; call compress()")

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None = None) -> CompressionReport:
        """Make the model smaller and measure time, memory and size."""
        for layer in linear_layers(model):
            if layer.is_replaced or quantized_weight(layer) is not None:
                raise BadInput(f"{layer.path} is quantized already; compression={self.name} must come first")
        made: list[SmallerReport] = []
        report = _Measured(self, made).compress(model, targets, calibration)
        report.smaller = made[0] if made else None
        return report


class _Measured(Method):
    """One reshaping, measured like every other method."""

    def __init__(self, method: Reshaping, made: list[SmallerReport]) -> None:
        self.method, self.made = method, made
        self.name = method.name  # type: ignore[misc]

    def check(self, targets: Targets) -> None:
        self.method.check(targets)

    def multiplies_in(self, model: Model) -> str | None:
        return self.method.multiplies_in(model)

    def apply(self, model: Model, targets: Targets, calibration: LongTensor | None) -> list[LayerReport]:
        if not targets:
            return []
        before = model.network.config
        reports = {layer.path: LayerReport.of(layer) for layer in targets}
        cut = self.method.cut(model, targets, calibration)
        dropped, moved = _blocks(model, cut.smaller)
        put_in_place(model, built(model.network, cut.smaller, cut.state))
        smaller = SmallerReport(
            parameters=model.parameter_count(),
            settings={
                name: [vars(part).get(name), value]
                for part, now in zip(parts_of(before), changed_settings(before, model.network.config), strict=True)
                for name, value in now.items()
            },
            dropped=dropped,
            moved=moved,
            measured=cut.measured,
        )
        targets.follow(model.network, smaller.path_now)
        for path, report in reports.items():
            done = cut.layers.get(path, report)
            done.removed = done.cut = cut.removed.get(path, 0)
            reports[path] = done
        self.made.append(smaller)
        return list(reports.values())


def _blocks(model: Model, smaller: Smaller) -> tuple[list[str], dict[str, str]]:
    """The blocks that are dropped, and those that get another number."""
    if not smaller.blocks:
        return [], {}
    kept = {old: new for new, old in smaller.blocks.items()}
    paths = model.architecture.block_paths(model.network)
    return [path for path in paths if path not in kept], {old: new for old, new in kept.items() if old != new}


def left_of(compression: Compression, targets: Callable[[], Targets]) -> dict[str, float]:
    """The share of each layer that remains, by path, for compressions that make the network smaller."""
    shares: dict[str, float] = {}
    for part in compression.parts:
        if isinstance(part, Reshaping):
            shares |= part.plan(targets())
    return shares
