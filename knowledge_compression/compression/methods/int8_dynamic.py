"""Dynamic int8 quantization: weights once, activations as they come (Namburi et al. 2023, section 3.2, PTDQ)."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.formats.int8_linear import Int8Linear, check_granularity
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.models import TargetLayer


@dataclass(frozen=True)
class Int8Dynamic(Layerwise):
    """Put int8 layers in the place of the targets; needs no text.

    Attributes:
        granularity: ``per_tensor`` (the paper's ``torch.ao.quantization.quantize_dynamic``: one scale a weight and one
            a batch of activations) or ``per_channel`` (one a weight row and one a token; independent of the batch).
    """

    granularity: str = "per_tensor"
    name = "int8_dynamic"
    modules = (Int8Linear,)
    takes_final = True

    def __post_init__(self) -> None:
        """Refuse a granularity that does not exist before anything is loaded."""
        check_granularity(self.granularity)

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Replace the layer in the network."""
        quantized = Int8Linear.of(layer.module, self.granularity)
        report = LayerReport.of(layer, bits=quantized.bits, overhead_bits=quantized.overhead_bits)
        layer.replace(quantized)
        return report
