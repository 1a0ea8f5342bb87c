"""Zero ablation: remove the whole target, to see what depended on it."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.models import TargetLayer


@dataclass(frozen=True)
class Ablation(Layerwise):
    """Set every weight of the target to zero; biases are kept. Needs no text.

    With ``target=experts target.blocks=[1] target.experts=[3]`` it removes a single expert: the router still sends
    tokens to it, and its output for them is zero.
    """

    name = "ablation"

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Set the layer's weights to zero in place."""
        layer.weight.zero_()
        return LayerReport.of(layer, removed=layer.parameters)
