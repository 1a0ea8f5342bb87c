"""Checkpoints of compressed-tensors, which vLLM and transformers (with that library) load.

``models/checkpoints/compressed_tensors.py`` reads them and describes each tensor. There is one layout for each kind
of code: ``pack-quantized`` for integers, ``int-quantized`` for those of layers that round their inputs to integers too,
``float-quantized``, ``mxfp4-pack-quantized`` and ``nvfp4-pack-quantized``.
The library multiplies codes by scales in the type of the scale. Scales are therefore stored in the type of everything
else if that holds them exactly, and in float32 otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_compression.compression.solve.coding import FP8, INT8, INTEGERS, MXFP4, NVFP4, CodedWeight, Coding
from knowledge_compression.compression.solve.floats import FloatWeight
from knowledge_compression.compression.solve.grid import QuantizedWeight, quantized_weight
from knowledge_compression.compression.solve.int8 import INPUT_STEPS, SEVEN_BITS, Int8Weight
from knowledge_compression.compression.writing.layers import NEIGHBOURS, LayerWriter, same
from knowledge_compression.compression.writing.places import Place
from knowledge_compression.compression.writing.words import packed
from knowledge_compression.heavy import torch
from knowledge_compression.models import Model
from knowledge_compression.models.families import FINAL
from knowledge_compression.models.targets import linear_layers

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def _integers(weight: CodedWeight, floats: torch.dtype) -> Mapping[str, Tensor]:
    assert isinstance(weight, QuantizedWeight)
    grid = weight.grid
    tensors = {
        ".weight_packed": packed(weight.codes.T, grid.bits).T.contiguous(),
        ".weight_scale": _exact(grid.scales, floats),
        ".weight_shape": torch.tensor(weight.codes.shape),
    }
    if not grid.symmetric:
        tensors[".weight_zero_point"] = packed(grid.zeros, grid.bits)
    return tensors


def _integers_of_eight(weight: CodedWeight, floats: torch.dtype) -> Mapping[str, Tensor]:
    assert isinstance(weight, Int8Weight)
    tensors = {".weight": weight.codes, ".weight_scale": _exact(weight.scales, floats)}
    if weight.input_scale is not None and weight.input_zero is not None:
        signed = weight.input_zero - 2 ** (SEVEN_BITS - 1)  # the library's codes of 7 bits begin at -64
        tensors |= {".input_scale": weight.input_scale.reshape(1)}
        tensors |= {".input_zero_point": signed.reshape(1).to(torch.int8)}
    return tensors


def _exact(scales: Tensor, floats: torch.dtype) -> Tensor:
    """Scales in the type of everything else, if that holds them."""
    return scales.to(floats if torch.equal(scales.to(floats).float(), scales) else torch.float32)


def _floats_of_eight(weight: CodedWeight, floats: torch.dtype) -> Mapping[str, Tensor]:
    assert isinstance(weight, FloatWeight)
    scales = weight.scales.reshape(1) if weight.block == (None, None) else weight.scales
    return {".weight": weight.codes.view(torch.float8_e4m3fn), ".weight_scale": scales}


def _floats_of_four(weight: CodedWeight, floats: torch.dtype) -> Mapping[str, Tensor]:
    assert isinstance(weight, FloatWeight)
    low, high = weight.codes.unflatten(1, (-1, 2)).unbind(2)
    tensors = {".weight_packed": low | high << 4, ".weight_scale": weight.scales}
    if weight.kind == NVFP4:
        tensors[".weight_scale"] = weight.scales.view(torch.float8_e4m3fn)
        tensors[".weight_global_scale"] = weight.whole
    return tensors


@dataclass(frozen=True)
class Layout:
    """How one kind of code is stored.

    Attributes:
        name: its ``format``.
        number: its ``type``: ``int`` or ``float``.
        tensors: the tensors of one layer, as :meth:`LayerWriter.tensors`.
        more: settings of its weights beyond those that follow from the coding.
    """

    name: str
    number: str
    tensors: Callable[[CodedWeight, torch.dtype], Mapping[str, Tensor]]
    more: Mapping[str, Any] = field(default_factory=dict)


LAYOUTS: Mapping[str, Layout] = {
    INTEGERS: Layout("pack-quantized", "int", _integers),
    INT8: Layout("int-quantized", "int", _integers_of_eight),
    FP8: Layout("float-quantized", "float", _floats_of_eight),
    MXFP4: Layout("mxfp4-pack-quantized", "float", _floats_of_four, {"scale_dtype": "torch.uint8"}),
    NVFP4: Layout(
        "nvfp4-pack-quantized",
        "float",
        _floats_of_four,
        {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"},
    ),
}


class CompressedTensorsWriter(LayerWriter):
    """The compressed-tensors format."""

    name = "compressed-tensors"

    def write(self, model: Model, folder: Path) -> Mapping[str, Any]:
        """Warn where programs that load the file round a token's inputs in different steps."""
        told = super().write(model, folder)
        found = (quantized_weight(layer) for layer in linear_layers(model))
        rounded = [one for one in found if isinstance(one, Int8Weight) and one.input_scale is None]
        if any(one.input_steps == INPUT_STEPS[0] for one in rounded):
            log.warning(
                "%s rounds a token's inputs in steps of their largest over 127, as vLLM does; transformers runs this "
                "file with 127.5, so its answers differ from this run's; compression.input_steps=127.5 rounds alike",
                model.name,
            )
        return told

    def unfit(self, coding: Coding, place: Place) -> str | None:
        """It holds most kinds of codes, in groups of neighbouring inputs."""
        if coding.kind not in LAYOUTS:
            return f"{self.name} does not hold {coding.kind}"
        if not coding.in_order:
            return NEIGHBOURS.format(self.name)
        if coding.activations and coding.kind == NVFP4:
            return f"{self.name} needs one scale for all inputs of a layer, and here each token has its own"
        return self.plain_linear(place)

    def tensors(self, weight: CodedWeight, floats: torch.dtype) -> Mapping[str, Tensor]:
        """Codes and scales in the layout of their kind."""
        return LAYOUTS[weight.coding.kind].tensors(weight, floats)

    def runs_in(self, coded: Mapping[Place, Coding], floats: torch.dtype) -> torch.dtype:
        """The library decodes 4-bit floats to bfloat16, and multiplies only in this type."""
        four = any(coding.kind in (MXFP4, NVFP4) for coding in coded.values())
        return torch.bfloat16 if four else floats

    def settings(self, coded: Mapping[Place, Coding], left: Mapping[str, str | None]) -> dict[str, Any]:
        """One group of layers, and the names of the layers outside it."""
        coding = same("coding", list(coded.values()))
        layout = LAYOUTS[coding.kind]
        final = [place.path for place in coded if place.role == FINAL]  # to vLLM it is no Linear, so it is named
        group: dict[str, Any] = {"targets": ["Linear", *final], "weights": _weights(coding, layout)}
        group |= {"format": layout.name}
        inputs = _inputs(coding, group["weights"]) if coding.activations else None
        group |= {"input_activations": inputs, "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": layout.name,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(left),
        }


def _weights(coding: Coding, layout: Layout) -> dict[str, Any]:
    outputs, inputs = coding.block
    strategy = "block"
    if outputs in (1, None):
        strategy = "group" if inputs else "channel" if outputs else "tensor"
    weights: dict[str, Any] = {"num_bits": coding.bits, "type": layout.number, "strategy": strategy}
    if strategy == "group":
        weights["group_size"] = inputs
    if strategy == "block":
        weights["block_structure"] = [outputs, inputs]
    return weights | {"symmetric": coding.symmetric, "dynamic": False} | dict(layout.more)


def _inputs(coding: Coding, weights: Mapping[str, Any]) -> dict[str, Any]:
    """How readers must round the inputs of a layer: token by token, or in blocks like those of the weights.

    Inputs with a fixed range have codes of 7 bits here; the format states this, so that readers clip at the same
    values.
    """
    if coding.static:
        return {"num_bits": SEVEN_BITS, "type": "int", "symmetric": False, "dynamic": False, "strategy": "tensor"}
    strategy = "group" if coding.group else "token"
    inputs = {name: weights[name] for name in ("num_bits", "type", "symmetric")} | {"dynamic": True}
    inputs |= {"strategy": strategy} | ({"group_size": coding.group} if coding.group else {})
    return inputs | ({"scale_dtype": weights["scale_dtype"]} if "scale_dtype" in weights else {})
