"""The base class of methods that store weights, and perhaps multiply inputs, as small floating-point numbers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.coding import Coding
from knowledge_compression.compression.solve.floats import Block, FloatWeight, coding_of
from knowledge_compression.models import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor

    from knowledge_compression.models.replaced import ReplacedLinear


@dataclass(frozen=True, kw_only=True)
class SmallFloats(Layerwise):
    """Round each layer's weights: implement :meth:`rounded`.

    Attributes:
        activations: whether each layer's inputs are rounded in the same way at run time, each token by itself.
    """

    activations: bool = False
    kind: ClassVar[str]

    @property
    @abstractmethod
    def block(self) -> Block:
        """Outputs and inputs that share a scale; None stands for all of them."""

    @abstractmethod
    def rounded(self, weight: Tensor) -> FloatWeight:
        """The nearest small floats of a weight ``[out_features, in_features]``."""

    @property
    def coding(self) -> Coding:
        """Small floats and their scales."""
        return coding_of(self.kind, self.block, activations=self.activations)

    @property
    def modules(self) -> tuple[type[ReplacedLinear], ...]:
        """A layer that rounds its inputs, if they are rounded."""
        from knowledge_compression.compression.formats.float_linear import FloatLinear

        return (FloatLinear,) if self.activations else ()

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Round the layer in place, or replace it by one that rounds its inputs too."""
        weight = replace(self.rounded(layer.weight), activations=self.activations)
        if self.activations:
            from knowledge_compression.compression.formats.float_linear import FloatLinear

            layer.replace(FloatLinear(weight, layer.bias_parameter, layer.weight.dtype).to(layer.weight.device))
        else:
            weight.put_into(layer)
        return weight.report(layer)
