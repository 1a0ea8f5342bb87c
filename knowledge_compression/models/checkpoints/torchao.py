"""Weights of torchao in safetensors, as transformers' ``TorchAoConfig`` saves them (torchao 0.18).

A layer's weight is ``_weight_qdata`` with ``_weight_scale`` and, but for floats, ``_weight_zero_point``:

- integers (``Int8Tensor``, ``IntxUnpackedToInt8Tensor``): int8 ``[out, in]`` and one scale for a block of any shape; a
  weight is ``(code - zero) * scale``;
- floats (``Float8Tensor``): float8 ``[out, in]``; a weight is ``value * scale``;
- 4 bits (``Int4Tensor``): uint8 ``[out, in / 2]``, the first of two codes in the low half, signed; scales and zeros are
  ``[groups, out]``, and a weight is ``code * scale + zero``.

If ``_weight_act_pre_scale`` is present, inputs are multiplied by it, which is the same as multiplying the weight's
columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.base import Coded, Format, fits, needed
from knowledge_compression.models.checkpoints.codes import spread, unpacked
from knowledge_compression.models.checkpoints.fp8 import FLOAT8
from knowledge_compression.models.streamed import Described

_CODES, _SCALE, _ZERO, _INPUTS = (f"._weight_{name}" for name in ("qdata", "scale", "zero_point", "act_pre_scale"))
_OTHERS = "_default"


@dataclass(frozen=True)
class TorchAo(Format):
    """torchao's format, see the module's docstring.

    Attributes:
        kinds: torchao's names for its settings.
        widths: bits of a code according to the settings of each layer, by its name or a pattern; None if they do not
            state it. Those of :data:`_OTHERS` are for all layers without settings of their own.
    """

    kinds: Sequence[str] = ()
    widths: Mapping[str, int | None] = field(default_factory=dict)

    name = "torchao"
    methods = ("torchao",)
    mark = _CODES
    endings = (_CODES, _SCALE, _ZERO, _INPUTS)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> TorchAo:
        """The settings of all layers, or of each.

        Raises:
            BadInput: they are those of a version that pickled its tensors.
        """
        told = settings.get("quant_type")
        if not isinstance(told, Mapping):
            raise BadInput(
                f"it is a torchao checkpoint with quant_type={told!r}, of a version that stored its tensors in "
                f"pickles; safetensors of torchao 0.18 can be read"
            )
        default = told.get("default")
        if not isinstance(default, Mapping):
            return cls()
        inside = default.get("_data")
        apart = inside.get("fqn_to_config", inside.get("module_fqn_to_config")) if isinstance(inside, Mapping) else None
        each = apart if isinstance(apart, Mapping) else {_OTHERS: default}
        each = {name: one for name, one in each.items() if isinstance(one, Mapping)}
        kinds = dict.fromkeys(str(one.get("_type", "")) for one in each.values())
        return cls(tuple(kinds), {name: _width(one) for name, one in each.items()})

    @property
    def names_coded(self) -> bool:
        """Whether there are no settings for layers without some of their own."""
        return bool(self.widths) and _OTHERS not in self.widths

    @property
    def notes(self) -> tuple[str, ...]:
        """A remark that activations are not rounded here."""
        rounded = [kind for kind in self.kinds if "DynamicActivation" in kind or "StaticActivation" in kind]
        if not rounded:
            return ()
        return (f"it is meant to be used with rounded activations ({', '.join(rounded)}), which is not done here",)

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """The codes' type and shape show which of the three it is.

        Raises:
            BadInput: it is another layout, such as those packed for one kind of processor.
        """
        codes = parts[_CODES]
        if codes.dtype in ("I8", *FLOAT8):
            needed(layer, parts, _SCALE, *([_ZERO] if codes.dtype == "I8" else []))
            shape, scales = codes.matrix(f"{layer}{_CODES}"), parts[_SCALE].shape
            if len(scales) > 2 or any(size % n for size, n in zip(shape, _two(scales), strict=True)):
                raise BadInput(f"{layer}{_SCALE} has the shape {list(scales)}, which does not divide {list(shape)}")
            if codes.dtype == "I8":
                fits(layer, _ZERO, parts[_ZERO].shape, scales)
            return Coded(shape, self._bits(layer) or 8, shape[0] * shape[1] // max(1, parts[_SCALE].count))
        if codes.dtype == "U8" and _ZERO in parts:
            needed(layer, parts, _SCALE)
            outputs, bytes_ = codes.matrix(f"{layer}{_CODES}")
            groups, _ = parts[_SCALE].matrix(f"{layer}{_SCALE}")
            for ending in (_SCALE, _ZERO):
                fits(layer, ending, parts[ending].shape, (groups, outputs))
            if groups == 0 or 2 * bytes_ % groups:
                raise BadInput(f"{layer} has {groups} groups, which do not divide its {2 * bytes_} inputs")
            return Coded((outputs, 2 * bytes_), 4, 2 * bytes_ // groups)
        raise BadInput(
            f"{layer} is stored by torchao as {codes.dtype} {list(codes.shape)}; int8, float8 and 4 bits in the plain "
            "packing can be read, and layouts packed for one kind of processor, MXFP and NVFP4 cannot"
        )

    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The floats, in float32."""
        codes, scales = parts[_CODES], parts[_SCALE].float()
        if codes.dtype == torch.uint8:
            signed = unpacked(codes, 4, 2 * codes.shape[1]).to(torch.int8)
            signed = torch.where(signed > 7, signed - 16, signed)
            run = signed.shape[1] // len(scales)
            weight = signed.float() * scales.T.repeat_interleave(run, 1)
            weight += parts[_ZERO].float().T.repeat_interleave(run, 1)
        else:
            shape = tuple(codes.shape)
            scales = scales.reshape(_two(scales.shape))
            block = tuple(size // n for size, n in zip(shape, scales.shape, strict=True))
            weight = codes.float()
            if codes.dtype == torch.int8:
                weight -= spread(parts[_ZERO].float().reshape(scales.shape), shape, block)
            weight *= spread(scales, shape, block)
        return weight * parts[_INPUTS].float().reshape(1, -1) if _INPUTS in parts else weight

    def _bits(self, layer: str) -> int | None:
        """Bits of a code according to the settings: those that name the layer, then the first pattern it matches."""
        patterns = (name for name in self.widths if name.startswith("re:") and re.fullmatch(name[3:], layer))
        found = layer if layer in self.widths else next(patterns, _OTHERS)
        return self.widths.get(found)


def _width(settings: Mapping[str, Any]) -> int | None:
    """Bits of a code according to the settings of one kind of layer."""
    inside = settings.get("_data")
    told = inside.get("weight_dtype") if isinstance(inside, Mapping) else None
    digits = re.search(r"int(\d)", str(told.get("_data"))) if isinstance(told, Mapping) else None
    return int(digits[1]) if digits else None


def _two(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of the scales as a matrix: of a single scale, or one per row."""
    rows, columns = (*shape, *(1, 1)[len(shape) :])
    return rows, columns
