"""Dynamic int8 quantization: weights beforehand, activations at run time (Namburi et al. 2023, section 3.2, PTDQ)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.formats.granularity import check_granularity
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.coding import Coding
from knowledge_compression.compression.solve.int8 import INPUT_STEPS, check_input_steps, int8_coding
from knowledge_compression.errors import BadInput
from knowledge_compression.identity import ADDED
from knowledge_compression.models import TargetLayer

if TYPE_CHECKING:
    from knowledge_compression.models.replaced import ReplacedLinear


@dataclass(frozen=True)
class Int8Dynamic(Layerwise):
    """Replace the targets by int8 layers; needs no text.

    Attributes:
        granularity: ``per_tensor`` (the paper's ``torch.ao.quantization.quantize_dynamic``: one scale per weight matrix
            and one per batch of activations) or ``per_channel`` (one per weight row and one per token; independent of
            the batch).
        input_steps: of ``per_channel``, the steps between zero and a token's largest magnitude: 127, as in SmoothQuant
            and vLLM, or 127.5, as transformers computes files of compressed-tensors.
    """

    granularity: str = "per_tensor"
    input_steps: float = field(default=INPUT_STEPS[0], metadata=ADDED)
    name = "int8_dynamic"
    takes_final = True

    def __post_init__(self) -> None:
        """Refuse an unknown granularity, and steps that it does not have, before anything is loaded."""
        check_granularity(self.granularity)
        check_input_steps(self.input_steps)
        if self.granularity == "per_tensor" and self.input_steps != INPUT_STEPS[0]:
            raise BadInput(
                f"compression.input_steps={self.input_steps:g} belongs to compression.granularity=per_channel; "
                "per_tensor rounds a batch in 127 steps"
            )

    @property
    def coding(self) -> Coding | None:
        """Integers with a scale per row."""
        return int8_coding(static=False) if self.granularity == "per_channel" else None

    @property
    def for_codes(self) -> str:
        """The granularity whose codes other programs can read."""
        return "compression.granularity=per_channel"

    @property
    def modules(self) -> tuple[type[ReplacedLinear], ...]:
        """Int8 layers."""
        from knowledge_compression.compression.formats.int8_linear import Int8Linear

        return (Int8Linear,)

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Replace the layer in the network."""
        from knowledge_compression.compression.formats.int8_linear import Int8Linear

        quantized = Int8Linear(layer.weight, layer.bias_parameter, self.granularity, self.input_steps)
        report = LayerReport.of(layer, bits=quantized.bits, overhead_bits=quantized.overhead_bits)
        layer.replace(quantized)
        return report
