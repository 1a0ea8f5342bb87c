"""The types of GGUF files (Q4_K, Q8_0 and others) and llama.cpp's mixtures of them (Q4_K_M and others)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knowledge_compression.compression.base import Layerwise, Shrinker, Walk
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.solve.mixtures import MIXTURES
from knowledge_compression.errors import BadInput
from knowledge_compression.models import TargetLayer, Targets

if TYPE_CHECKING:
    from torch import Tensor

# Types, with the bits of a code.
BITS = {"q2_k": 2, "q3_k": 3, "q4_k": 4, "q5_k": 5, "q6_k": 6, "iq4_nl": 4, "mxfp4": 4}
BITS |= {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5, "q8_0": 8}

TypeOf = Callable[[TargetLayer], str]


@dataclass(frozen=True)
class Gguf(Layerwise):
    """Round every weight to the nearest point of a GGUF type's grid; needs no text.

    ``output.save_model=gguf`` stores the same blocks. A layer whose number of inputs is not a multiple of 256 gets the
    type that llama.cpp falls back on, which the report names.

    Attributes:
        type: ``q2_k`` to ``q6_k``, ``q4_0``, ``q4_1``, ``q5_0``, ``q5_1``, ``q8_0``, ``iq4_nl`` or ``mxfp4``; or a
            mixture, which gives each layer one of these by its role and depth: ``q2_k_mixed``, ``q3_k_s``, ``q3_k_m``,
            ``q3_k_l``, ``q4_k_s``, ``q4_k_m``, ``q5_k_s``, ``q5_k_m``.
    """

    type: str = "q4_k"
    name = "gguf"

    def __post_init__(self) -> None:
        """Refuse a type that does not exist before anything is loaded."""
        check_type(self.type)

    def check(self, targets: Targets) -> None:
        """Refuse layers whose rows are not whole blocks, and models to which a mixture does not apply."""
        check_fitting(self.type, targets)

    def shrinker(self, targets: Targets, walk: Walk, state: Any = None) -> Shrinker:
        """Each layer is compressed on its own, once a mixture has given each its type."""
        chosen = types_of(self.type, targets)
        return Shrinker(lambda layer: rounded(layer, chosen(layer)))

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Quantize the layer in place, to a single type."""
        return rounded(layer, self.type)


def check_type(name: str) -> None:
    """Refuse a type that does not exist.

    Raises:
        BadInput: there is no such type.
    """
    if name not in BITS and name not in MIXTURES:
        offered = ", ".join(sorted({*BITS, *MIXTURES}))
        raise BadInput(f"compression.type={name} is not offered; choose one of {offered}")


def check_fitting(name: str, targets: Targets) -> None:
    """Refuse layers whose rows are not whole blocks, and models to which a mixture does not apply.

    Raises:
        BadInput: there is such a layer, or the mixture does not apply to the model.
    """
    from gguf import GGMLQuantizationType as Kind

    from knowledge_compression.compression.formats.gguf_blocks import fitting

    chosen = types_of(name, targets)
    for layer in targets:
        width = layer.weight.shape[1]
        if fitting(Kind[chosen(layer).upper()], width) is None:
            raise BadInput(
                f"compression.type={name} stores 32 neighbouring inputs together, and {layer.path} has {width} "
                "inputs; choose a target without it, or compression=rtn"
            )


def types_of(name: str, layers: Sequence[TargetLayer]) -> TypeOf:
    """The type of each layer.

    Raises:
        BadInput: the type is a mixture, whose rules use llama.cpp's tensor names, and llama.cpp has none for this
            model.
    """
    if name not in MIXTURES or not layers:
        return lambda layer: MIXTURES.get(name, name)
    from knowledge_compression.compression.formats.gguf_mixtures import MixedModel

    return MixedModel.of(layers[0].network, name).type_of


def rounded(layer: TargetLayer, name: str, importance: Tensor | None = None) -> LayerReport:
    """Write the nearest blocks of a type into a layer.

    Args:
        layer: the layer, changed in place.
        name: name of the type.
        importance: weight of each input's squared errors, ``[in_features]``; None if all are equal.
    """
    from gguf import GGMLQuantizationType as Kind

    from knowledge_compression.compression.formats.gguf_blocks import Blocks, fitting

    asked, weight = Kind[name.upper()], layer.weight
    kind = fitting(asked, weight.shape[1])
    assert kind is not None
    blocks = Blocks.of(weight, kind, importance)
    blocks.put_into(layer)
    bits = BITS[kind.name.lower()]
    return LayerReport.of(
        layer,
        bits=float(bits),
        overhead_bits=8 * blocks.data.nbytes - bits * layer.parameters,
        fallbacks=[] if kind == asked else [f"{kind.name.lower()}_for_{name}"],
    )
