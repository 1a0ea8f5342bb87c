"""Base classes of compression methods: each method is a frozen dataclass that does one thing to a layer.

A method is one short file in ``methods/`` and one YAML under ``conf/compression/``; nothing is registered anywhere.
Choose the base class by what the method needs to know about a layer:

- :class:`Layerwise`: the layer alone (``shrink``);
- :class:`Ranked`: how each weight ranks among the weights of all layers (``score``);
- :class:`~knowledge_compression.compression.calibrated.Calibrated`: the inputs that the layer reads (``observe`` and
  ``solve``);
- :class:`~knowledge_compression.compression.reshaping.Reshaping`: the whole network, whose architecture becomes
  smaller (``plan`` and ``cut``).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from knowledge_compression.compression.layer_reports import CompressionReport, LayerReport
from knowledge_compression.compression.solve.coding import Coding
from knowledge_compression.compression.solve.patterns import Pattern
from knowledge_compression.compression.solve.threshold import Cut, pieces, smallest
from knowledge_compression.errors import BadInput
from knowledge_compression.memory import peak_memory
from knowledge_compression.models import Model, TargetLayer, Targets
from knowledge_compression.models.families import FINAL
from knowledge_compression.models.soundness import check_finite, weights_of
from knowledge_compression.progress import shown

if TYPE_CHECKING:
    from torch import LongTensor, Tensor, nn

    from knowledge_compression.models.replaced import ReplacedLinear

SCOPES = ("global", "layer")

Walk = Callable[[], Iterable[TargetLayer]]
"""Yields layers one at a time; only the weights of the current layer are certain to be in memory."""


class Compression(ABC):
    """A way to make a model smaller.

    Attributes:
        name: its name in reports, e.g. ``gptq``.
        calibrated: whether it needs calibration text.
        takes_final: whether it also compresses the final layer when the target is the whole model, as published.
    """

    name: ClassVar[str]
    calibrated: ClassVar[bool] = False
    takes_final: ClassVar[bool] = False

    # Whether it also changes weights outside the targets. Its result is then not kept for other runs.
    beyond_targets: ClassVar[bool] = False

    @property
    def parts(self) -> Sequence[Compression]:
        """The methods that this one consists of, in order: itself, unless it is a pipeline."""
        return (self,)

    @property
    def modules(self) -> tuple[type[ReplacedLinear], ...]:
        """The classes of the modules that replace linear layers; empty if the method changes only weights."""
        return ()

    def multiplies_in(self, model: Model) -> str | None:
        """The dtype of products in its forward passes on calibration text, e.g. ``bfloat16``; None if it makes none."""
        return None

    @property
    def coding(self) -> Coding | None:
        """How the resulting weights are stored as codes; None if they are plain numbers."""
        return None

    @property
    def for_codes(self) -> str:
        """The setting that would give codes, if :attr:`coding` is None because of a setting; otherwise empty."""
        return ""

    @property
    def reshapes(self) -> bool:
        """Whether it makes the network itself smaller, so that the model gets a new network."""
        return False

    @property
    def streams(self) -> bool:
        """Whether it can compress a model from disk to disk, for which linear layers must stay linear layers."""
        return not self.modules

    def check_budget(self, targets: Targets) -> None:  # noqa: B027  # most methods have none
        """Refuse a budget that the shapes of these layers exclude; asked before a sweep starts, of weights not loaded.

        Raises:
            BadInput: no choice is within it.
        """

    def passes(self, windows: int, length: int) -> float:
        """How often calibration text of so many windows goes through the network, for the forecast; by this part only.

        Backwards counts as two times forwards.
        """
        return 0.0

    @abstractmethod
    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None = None) -> CompressionReport:
        """Compress the target layers in place.

        Args:
            model: the model whose network is changed.
            targets: the layers to compress. Nothing else changes, except that a tied head among them is untied first,
                and that parameters which take factors of inputs are scaled (the report names them). If the method makes
                the network smaller, ``targets`` afterwards holds the layers that remain.
            calibration: token ids ``[samples, length]``, int64 on the CPU, where :attr:`calibrated`.

        Returns:
            Which layers were compressed, and what was achieved.

        Raises:
            BadInput: the settings do not fit these layers or this model, a target is already quantized, or a weight of
                the model is not finite; the model is unchanged.
        """


class Method(Compression):
    """A compression of one step: the method checks and changes layers; this class measures time, memory and size."""

    def check(self, targets: Targets) -> None:
        """Refuse settings that do not fit these layers.

        Raises:
            BadInput: e.g. a group size that does not divide a layer's inputs.
        """

    @abstractmethod
    def apply(self, model: Model, targets: Targets, calibration: LongTensor | None) -> list[LayerReport]:
        """Compress the layers in place and report on each."""

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None = None) -> CompressionReport:
        """Untie the head if it is a target, apply the method, and measure time, memory and size."""
        if self.takes_final and targets.takes_final_when_quantized:
            targets = targets.with_final()
        for layer in targets:
            if layer.is_replaced:
                raise BadInput(f"{layer.path} is quantized already; quantize last, after pruning")
        if self.modules and (fixed := [layer for layer in targets if not layer.is_replaceable]):
            raise BadInput(
                f"compression={self.name} replaces linear layers by modules of its own, and {len(fixed)} of the "
                f"{len(targets)} targets are not linear layers, e.g. {fixed[0].path}; choose a target without them, "
                "or a method that changes only weights, e.g. compression=rtn compression.bits=8"
            )
        self.check(targets)
        if targets:  # without targets no weight is read
            check_finite(weights_of(model), model.name)
        report = CompressionReport(method=self.name, model_parameters=model.parameter_count(), stored=model.on_disk)
        if any(layer.role == FINAL for layer in targets):
            model.untie_head()
        report.model_bytes_before = memory_bytes(model.network)
        start = time.perf_counter()
        with peak_memory(model.device) as peak:
            report.layers = self.apply(model, targets, calibration)
        report.seconds = time.perf_counter() - start
        report.peak_memory = peak.bytes
        report.forward_dtype = self.multiplies_in(model)
        report.model_bytes_after = memory_bytes(model.network)
        return report


class LayerByLayer(Method):
    """A method that compresses one layer at a time and needs no calibration text."""

    @abstractmethod
    def shrinker(self, targets: Targets, walk: Walk, state: Any = None) -> Shrinker:
        """The function that compresses a layer, once everything it needs to know about the other layers is known.

        Args:
            targets: all layers.
            walk: yields them one at a time, in order, each time it is called.
            state: the state of an interrupted shrinker; the new one continues after the layers that it finished.
        """

    def apply(self, model: Model, targets: Targets, calibration: LongTensor | None) -> list[LayerReport]:
        """Compress the layers in order."""
        shrinker = self.shrinker(targets, lambda: shown(targets, "ranking"))
        return [shrinker(layer) for layer in shown(targets, "compressing")]


@dataclass(frozen=True)
class Shrinker:
    """Compresses a layer in place and times it.

    Attributes:
        shrink: compresses the layer and returns the report.
        cut: the threshold of a ranking over all layers' weights; None if each layer is compressed on its own.
    """

    shrink: Callable[[TargetLayer], LayerReport]
    cut: Cut | None = None

    def __call__(self, layer: TargetLayer) -> LayerReport:
        """Compress the layer."""
        start = time.perf_counter()
        report = self.shrink(layer)
        report.seconds = time.perf_counter() - start
        return report

    @property
    def state(self) -> Any:
        """The state from which another shrinker can resume here, JSON-ready."""
        return self.cut and self.cut.state


class Layerwise(LayerByLayer):
    """A method that needs to know only the layer itself: implement :meth:`shrink`."""

    @abstractmethod
    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Compress the layer: write into ``layer.weight`` (``[out_features, in_features]``), or replace the module.

        Returns:
            ``LayerReport.of(layer, ...)`` with the bits and the number of removed weights.
        """

    def shrinker(self, targets: Targets, walk: Walk, state: Any = None) -> Shrinker:
        """Each layer is compressed on its own."""
        return Shrinker(self.shrink)


class Patterned(Method):
    """A method whose ``pattern``, if one is set, decides how many weights of each group of inputs stay."""

    pattern: str | None

    @property
    def shape(self) -> Pattern | None:
        """The n:m pattern, if one is set.

        Raises:
            BadInput: it is not of the form n:m.
        """
        return Pattern.parse(self.pattern) if self.pattern is not None else None

    def check(self, targets: Targets) -> None:
        """Refuse a pattern that does not divide a layer's number of inputs."""
        super().check(targets)
        if self.shape:
            self.shape.check(targets)


@dataclass(frozen=True)
class Ranked(Patterned, LayerByLayer):
    """Set the weights with the lowest scores to zero: implement :meth:`score`.

    Attributes:
        sparsity: share of the targets' weights to remove, in [0, 1); ``round(sparsity * weights)`` are removed, as in
            ``torch.nn.utils.prune``.
        scope: ``global`` ranks the weights of all targets together, ``layer`` ranks each layer's weights separately.
        pattern: ``n:m``, e.g. ``2:4``: keep n of every m neighbouring inputs; the sparsity is then that of the pattern.
    """

    sparsity: float
    scope: str = "global"
    pattern: str | None = None

    def __post_init__(self) -> None:
        """Refuse invalid settings before anything is loaded."""
        check_sparsity(self.sparsity)
        if self.scope not in SCOPES:
            raise BadInput(f"scope={self.scope} does not exist; choose one of {', '.join(SCOPES)}")
        _ = self.shape

    @abstractmethod
    def score(self, layer: TargetLayer) -> Tensor:
        """The importance of each weight, ``[out_features, in_features]``; the sign is ignored, the lowest is removed
        first.

        Repeated calls for a layer must return the same scores. Among equal scores the first in forward order are
        removed.
        """

    def shrinker(self, targets: Targets, walk: Walk, state: Any = None) -> Shrinker:
        """Rank all weights if the scope is global."""
        if pattern := self.shape:
            return Shrinker(lambda layer: self._prune(layer, pattern.removes))
        if self.scope == "layer":
            return Shrinker(lambda layer: self._prune(layer, self._cut(layer.parameters, lambda: [layer]).removes))
        cut = Cut(*state) if state else self._cut(targets.parameters, walk)
        return Shrinker(partial(self._prune, removes=cut.removes), cut)

    def _cut(self, weights: int, walk: Walk) -> Cut:
        return smallest(lambda: map(self.score, walk()), round(self.sparsity * weights))

    def _prune(self, layer: TargetLayer, removes: Callable[[Tensor], Tensor]) -> LayerReport:
        removed = 0
        for scores, weights in zip(pieces(self.score(layer)), pieces(layer.weight), strict=True):
            mask = removes(scores)
            weights.masked_fill_(mask, 0)
            removed += int(mask.sum())
        return LayerReport.of(layer, removed=removed)


def check_sparsity(sparsity: float) -> None:
    """Refuse a sparsity outside [0, 1)."""
    if not 0.0 <= sparsity < 1.0:
        raise BadInput(f"sparsity={sparsity} is not a share of the weights; it must lie in [0, 1), e.g. sparsity=0.2")


def memory_bytes(network: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers, also of those that a divided network keeps elsewhere."""
    tensors = {t.data_ptr() or id(t): t for t in [*network.parameters(), *network.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())
