"""The types of GGUF files, K quants among them: what llama.cpp's users call Q4_K or Q8_0."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.errors import BadInput
from knowledge_compression.models import TargetLayer, Targets

# Types, with the bits of a code.
BITS = {"q2_k": 2, "q3_k": 3, "q4_k": 4, "q5_k": 5, "q6_k": 6, "iq4_nl": 4, "mxfp4": 4}
BITS |= {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8}


@dataclass(frozen=True)
class Gguf(Layerwise):
    """Round every weight to the nearest point of a GGUF type's grid; needs no text.

    ``output.save_model=gguf`` stores the same blocks. A layer whose inputs are no multiple of 256 is given the type
    that llama.cpp falls back on, which its report names.

    Attributes:
        type: ``q2_k`` to ``q6_k``, ``q4_0``, ``q4_1``, ``q5_0``, ``q5_1``, ``q8_0``, ``iq4_nl`` or ``mxfp4``.
    """

    type: str = "q4_k"
    name = "gguf"

    def __post_init__(self) -> None:
        """Refuse a type that does not exist before anything is loaded."""
        if self.type not in BITS:
            raise BadInput(f"compression.type={self.type} is not offered; choose one of {', '.join(sorted(BITS))}")

    def check(self, targets: Targets) -> None:
        """Refuse layers whose rows no block fills."""
        from gguf import GGMLQuantizationType as Kind

        from knowledge_compression.compression.formats.gguf_blocks import fitting

        for layer in targets:
            width = layer.weight.shape[1]
            if fitting(Kind[self.type.upper()], width) is None:
                raise BadInput(
                    f"compression.type={self.type} stores 32 neighbouring inputs together, and {layer.path} has "
                    f"{width}; choose a target without it, or compression=rtn"
                )

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Quantize the layer in place."""
        from gguf import GGMLQuantizationType as Kind

        from knowledge_compression.compression.formats.gguf_blocks import Blocks, fitting

        asked, weight = Kind[self.type.upper()], layer.weight
        kind = fitting(asked, weight.shape[1])
        assert kind is not None
        blocks = Blocks.of(weight, kind)
        blocks.put_into(layer)
        bits = BITS[kind.name.lower()]
        return LayerReport.of(
            layer,
            bits=float(bits),
            overhead_bits=8 * blocks.data.nbytes - bits * layer.parameters,
            fallbacks=[] if kind == asked else [f"{kind.name.lower()}_for_{self.type}"],
        )
