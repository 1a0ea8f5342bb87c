"""bitsandbytes' NF4, FP4 and int8 as transformers stores them in safetensors.

4 bits: ``weight`` uint8 ``[out * in / 2, 1]``, two codes a byte, the high half first; the bytes may be declared as
wider numbers (``bnb_4bit_quant_storage``). ``weight.quant_map`` float32 ``[16]``, the value of each code;
``weight.absmax``, the scale of each run of ``blocksize`` weights; and the settings as JSON in
``weight.quant_state.bitsandbytes__nf4`` or ``__fp4``. Where the scales are quantized too ("double quantization"),
``absmax`` is uint8, and a scale is ``nested_quant_map[absmax] * nested_absmax + nested_offset`` (Dettmers et al.,
QLoRA, 2023, section 3). 8 bits: ``weight`` int8 ``[out, in]`` and ``SCB`` float32 ``[out]``; a weight is
``code * SCB / 127`` (Dettmers et al., LLM.int8(), 2022).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.base import Coded, Format, fits, needed
from knowledge_compression.models.checkpoints.codes import unpacked
from knowledge_compression.models.streamed import Described

_OF_127 = 7.874015748031496e-3  # 1 / 127


@dataclass(frozen=True)
class FourBit(Format):
    """NF4 and FP4 of bitsandbytes, see the module."""

    name = "bitsandbytes 4 bits"
    methods = ("bitsandbytes_4bit",)
    left_out = "llm_int8_skip_modules"
    mark = ".weight.absmax"
    kinds = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
    endings = (
        *(".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map"),
        *kinds,
    )
    telling = kinds

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> FourBit:
        """Everything needed is stored with each layer."""
        return cls()

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """The shape, from the layer's settings."""
        needed(layer, parts, ".weight", ".weight.absmax", ".weight.quant_map")
        if not any(kind in parts for kind in self.kinds):
            raise BadInput(
                f"it holds {layer}.weight.absmax without {layer}{self.kinds[0]} or __fp4, which describes it"
            )
        fits(layer, ".weight.quant_map", parts[".weight.quant_map"].shape, (16,))
        ((kind, state),) = told.items()
        settings = _settings(layer, state)
        shape, run = settings["shape"], settings["blocksize"]
        if parts[".weight"].bytes != -(-math.prod(shape) // 2):
            raise BadInput(
                f"{layer}.weight has {parts['.weight'].bytes} bytes, but its settings give the shape {list(shape)}"
            )
        if parts[".weight.absmax"].count != -(-math.prod(shape) // run):
            raise BadInput(
                f"{layer}.weight.absmax has {parts['.weight.absmax'].count} scales, but its settings give one for "
                f"every {run} of {math.prod(shape)} weights"
            )
        if parts[".weight.absmax"].dtype == "U8":
            needed(layer, parts, ".weight.nested_absmax", ".weight.nested_quant_map")
        return Coded(shape, 4, run, kind.rpartition("__")[2].upper())

    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The value of each code times the scale of its run, rounded once."""
        told = _settings(layer, next(parts[kind] for kind in self.kinds if kind in parts))
        shape, run = told["shape"], told["blocksize"]
        packed, scales = parts[".weight"].flatten().view(torch.uint8), parts[".weight.absmax"]
        if scales.dtype == torch.uint8:
            values = parts[".weight.nested_quant_map"].float()[scales.int()]
            values *= _each(parts[".weight.nested_absmax"].float(), told["nested_blocksize"], scales.numel())
            scales = values + told["nested_offset"]
        count = math.prod(shape)
        codes = unpacked(packed, 4, 2 * packed.numel()).unflatten(0, (-1, 2)).flip(1).flatten()[:count]
        weight = parts[".weight.quant_map"].float()[codes.int()]
        return weight.mul_(_each(scales.float(), run, count)).reshape(shape)


@dataclass(frozen=True)
class EightBit(Format):
    """LLM.int8() of bitsandbytes, see the module."""

    name = "bitsandbytes 8 bits"
    methods = ("bitsandbytes_8bit",)
    left_out = "llm_int8_skip_modules"
    mark = ".SCB"
    endings = (".weight", ".SCB")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> EightBit:
        """There is only one layout."""
        return cls()

    @property
    def notes(self) -> tuple[str, ...]:
        """A remark that activations are not rounded here."""
        return ("it is meant to be used with activations rounded to 8 bits except outliers, which is not done here",)

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """One scale per output."""
        needed(layer, parts, ".weight")
        outputs, inputs = parts[".weight"].matrix(f"{layer}.weight")
        if parts[".weight"].dtype != "I8":
            raise BadInput(f"{layer}.weight is {parts['.weight'].dtype} beside SCB, which scales int8")
        fits(layer, ".SCB", parts[".SCB"].shape, (outputs,))
        return Coded((outputs, inputs), 8, inputs)

    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """``code * SCB / 127``, in this order, as bitsandbytes computes it."""
        return parts[".weight"].float().mul_(parts[".SCB"].float()[:, None]).mul_(_OF_127)


def _each(scales: Tensor, run: int, count: int) -> Tensor:
    """Each scale for ``run`` values, the last for the rest of ``count``."""
    return scales.repeat_interleave(run)[:count]


def _settings(layer: str, stored: Tensor) -> dict[str, Any]:
    """The settings that a layer's ``quant_state`` holds.

    Raises:
        BadInput: they are not in the form that bitsandbytes writes.
    """
    try:
        told = json.loads(bytes(stored.tolist()))
        found: dict[str, Any] = {
            "shape": tuple(int(n) for n in told["shape"]),
            "blocksize": int(told["blocksize"]),
            "nested_blocksize": int(told.get("nested_blocksize", 256)),
            "nested_offset": float(told.get("nested_offset", 0.0)),
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{layer}.weight.quant_state is not in the form that bitsandbytes writes ({error})") from None
    if any(n < 1 for n in (*found["shape"], found["blocksize"], found["nested_blocksize"])):
        raise BadInput(f"{layer}.weight.quant_state has sizes below 1")
    return found
