"""Sparse checkpoints of compressed-tensors 0.9 to 0.12: the weights that are not zero, and a bit for each place.

A layer is ``bitmask`` uint8 ``[out, ceil(in / 8)]``, the first input in the lowest bit; ``compressed``, the values
whose bits are set, row by row; and ``shape``, two whole numbers. ``sparse-24-bitmask`` has exactly two values for each
four inputs, so that ``compressed`` is ``[out, in / 2]``; ``sparse-bitmask`` is a list of any number of values, and has
``row_offsets`` that say where each row begins. Values are floats; or FP8 or int8 with a ``weight_scale`` beside them,
one for all or one per output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.base import Coded, Format, fits, needed
from knowledge_compression.models.streamed import Described

TWO_OF_FOUR, ANY = "sparse-24-bitmask", "sparse-bitmask"
_BITS = {"F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "I8": 8}
_CODES = ("F8_E4M3", "I8")


@dataclass(frozen=True)
class SparseTensors(Format):
    """Bitmasks of compressed-tensors, see the module.

    Attributes:
        layout: :data:`TWO_OF_FOUR` or :data:`ANY`.
        version: version of the library that wrote the file.
        activations: whether inputs are rounded at run time.
    """

    layout: str
    version: str = ""
    activations: bool = False

    name = "compressed-tensors"
    methods = ("compressed-tensors",)
    left_out = "ignore"
    mark = ".bitmask"
    endings = (".bitmask", ".compressed", ".shape", ".row_offsets", ".weight_scale")
    telling = (".shape",)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> SparseTensors:
        """Its ``sparsity_config``, and whether it has ``config_groups``."""
        sparse = settings["sparsity_config"]
        layout = sparse.get("format")
        if layout not in (TWO_OF_FOUR, ANY):
            raise BadInput(
                f"it is a compressed-tensors checkpoint in the sparse layout {layout}; {TWO_OF_FOUR} and {ANY} can be "
                f"read"
            )
        groups = settings.get("config_groups") or {}
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            eight = isinstance(weights, Mapping) and weights.get("num_bits") == 8
            if not eight or weights.get("symmetric") is False or weights.get("block_structure"):  # type: ignore[union-attr]
                raise BadInput(
                    f"it is a sparse compressed-tensors checkpoint whose config_groups.{name} is not symmetric FP8 or "
                    "int8 with one scale or one per output; only these and sparse floats can be read"
                )
        activations = any(group.get("input_activations") is not None for group in groups.values())
        return (SparseCodes if groups else SparseTensors)(layout, str(settings.get("version") or ""), activations)

    @property
    def made_by(self) -> str:
        """The version of the library that wrote the file."""
        return f"compressed-tensors {self.version}" if self.version else ""

    @property
    def notes(self) -> tuple[str, ...]:
        """A remark that activations are not rounded here."""
        return ("it is meant to be used with rounded activations, which is not done here",) if self.activations else ()

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """The shape that the file states; the number of values must be that of the bits that are set."""
        needed(layer, parts, ".compressed", ".shape")
        values = parts[".compressed"]
        if values.dtype not in _BITS:
            raise BadInput(f"{layer}.compressed is {values.dtype}; {', '.join(_BITS)} can be read")
        if (values.dtype in _CODES) != (".weight_scale" in parts):
            raise BadInput(f"{layer}.compressed is {values.dtype}, and weight_scale belongs to {', '.join(_CODES)}")
        shape = tuple(told[".shape"].flatten().tolist())
        if len(shape) != 2 or min(shape) < 1:
            raise BadInput(f"{layer}.shape is {list(shape)}, which must be two sizes")
        fits(layer, ".bitmask", parts[".bitmask"].shape, (shape[0], -(-shape[1] // 8)))
        if parts[".bitmask"].dtype != "U8":
            raise BadInput(f"{layer}.bitmask is {parts['.bitmask'].dtype}, which must be U8")
        if ".weight_scale" in parts and parts[".weight_scale"].count not in (1, shape[0]):
            raise BadInput(
                f"{layer}.weight_scale has {parts['.weight_scale'].count} numbers, which must be 1 or {shape[0]}"
            )
        if self.layout == TWO_OF_FOUR and (shape[1] % 4 or values.count * 2 != shape[0] * shape[1]):
            raise BadInput(f"{layer}.compressed has {values.count} values, which is not half of {list(shape)}")
        return Coded(shape, _BITS[values.dtype], None, f"{_BITS[values.dtype]} bits, sparse")

    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The values at the places whose bits are set, times their scale, and zeros elsewhere."""
        shape = tuple(parts[".shape"].flatten().tolist())
        places = _places(parts[".bitmask"], shape)
        if self.layout == TWO_OF_FOUR and not bool((places.unflatten(1, (-1, 4)).sum(-1) == 2).all()):
            raise BadInput(
                f"{layer}.bitmask does not set two bits of each four, which the layout {self.layout} requires"
            )
        if (there := int(places.sum())) != parts[".compressed"].numel():
            raise BadInput(f"{layer}.bitmask sets {there} bits for {parts['.compressed'].numel()} values")
        weight = torch.zeros(shape)
        weight[places] = parts[".compressed"].float().flatten()
        scale = parts.get(".weight_scale")
        return weight if scale is None else weight.mul_(scale.float().reshape(-1, 1))


class SparseCodes(SparseTensors):
    """Values in FP8 or int8; layers are recognised by their scales, so that none of them can pass for plain numbers."""

    mark = ".weight_scale"

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """As in the base class; a layer that is not sparse is refused."""
        if ".bitmask" not in parts:
            raise BadInput(f"it holds {layer} as codes without a bitmask beside sparse layers; all must be sparse")
        return super().coded(layer, parts, told)


def _places(bitmask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Which weights are stored, bool ``[out, in]``."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (bitmask[..., None] >> shifts & 1).flatten(1)[:, : shape[1]].bool()
