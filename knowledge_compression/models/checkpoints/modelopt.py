"""Checkpoints of NVIDIA's Model Optimizer (0.47, its export for Hugging Face).

The types of ``weight`` and ``weight_scale`` say how a layer is coded:

- float8 ``[out, in]`` with floats: one scale, one a row, or one a block, ``[out / b, 1, in / b, 1]``;
- float8 with bytes ``[out, in / 32]``, which are powers of two (MXFP8);
- int8 ``[out, in]`` with floats ``[out]``;
- uint8 ``[out, in / 2]``, 4-bit floats, with E4M3 ``[out, groups]`` and one float32 ``weight_scale_2`` (NVFP4), or with
  powers of two (MXFP4); the even input is in the low half;
- uint8 ``[out / 2, in]``, signed integers of 4 bits, with floats ``[out, groups]``; the even output is in the low half.

A weight is the code times its scales. ``pre_quant_scale``, if present, multiplies the layer's inputs, which is the same
as multiplying the weight's columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.base import Coded, Format, fits, needed, rounded_at_run_time
from knowledge_compression.models.checkpoints.codes import fp4, powers_of_two, spread, unpacked
from knowledge_compression.models.streamed import Described

_MIXED = "MIXED_PRECISION"  # an algorithm for each layer
# Each algorithm, and whether it rounds inputs at run time too.
ALGORITHMS: Mapping[str, bool] = {
    **dict.fromkeys(("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "W8A8_SQ_PER_CHANNEL", "W4A8_AWQ"), True),
    **dict.fromkeys(("NVFP4", "NVFP4_AWQ", "MXFP4", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8"), True),
    **dict.fromkeys(("FP8_PB_WO", "W8A16", "W4A16_AWQ", "W4A16_NVFP4"), False),
}
_FLOATS = ("F32", "F16", "BF16")
_BITS = {"F8_E4M3": 8, "I8": 8, "U8": 4}


@dataclass(frozen=True)
class ModelOpt(Format):
    """The format of Model Optimizer, see the module's docstring.

    Attributes:
        made_by: the program and its version.
        rounded: what else is rounded at run time.
    """

    made_by: str = ""
    rounded: Sequence[str] = ()

    name = "modelopt"
    methods = ("modelopt",)
    left_out = "ignore"
    mark = ".weight_scale"
    endings = (".weight", ".weight_scale", ".weight_scale_2", ".pre_quant_scale")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ModelOpt:
        """The algorithm of all layers, or of each; older files have the settings one level down.

        Raises:
            BadInput: an algorithm is none of :data:`ALGORITHMS`.
        """
        inside = settings.get("quantization")
        told = {**settings, **inside} if isinstance(inside, Mapping) else settings
        algorithm = str(told.get("quant_algo")).upper()
        each = told.get("quantized_layers") if algorithm == _MIXED else None
        layers = each.values() if isinstance(each, Mapping) else ()
        named = {str(one.get("quant_algo")).upper() for one in layers if isinstance(one, Mapping)} or {algorithm}
        if unknown := sorted(named - ALGORITHMS.keys()):
            raise BadInput(
                f"it is a checkpoint of Model Optimizer with quant_algo={unknown[0]}; {', '.join(sorted(ALGORITHMS))} "
                f"can be read"
            )
        rounded = ["inputs"] if any(ALGORITHMS[one] for one in named) else []
        rounded += ["keys and values"] if told.get("kv_cache_scheme") or told.get("kv_cache_quant_algo") else []
        by = told.get("producer")
        maker = [str(by.get(part, "")) for part in ("name", "version")] if isinstance(by, Mapping) else []
        return cls(" ".join(maker).strip(), rounded)

    @property
    def notes(self) -> Sequence[str]:
        """A remark that nothing is rounded at run time here."""
        return rounded_at_run_time(self.rounded)

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """From the types and shapes of the codes and scales.

        Raises:
            BadInput: they are none of the combinations above.
        """
        needed(layer, parts, ".weight")
        codes, scales = parts[".weight"], parts[".weight_scale"]
        rows, columns = codes.matrix(f"{layer}.weight")
        match codes.dtype, scales.dtype:
            case ("F8_E4M3" | "I8", kind) if kind in _FLOATS:
                shape = (rows, columns)
            case "F8_E4M3", "U8":
                shape = (rows, columns)
            case "U8", "F8_E4M3":
                needed(layer, parts, ".weight_scale_2")
                shape = (rows, 2 * columns)
            case "U8", "U8":
                shape = (rows, 2 * columns)
            case "U8", kind if kind in _FLOATS:
                shape = (2 * rows, columns)
            case _:
                raise BadInput(
                    f"{layer} is stored as {codes.dtype} with scales {scales.dtype}, which no layout of Model "
                    f"Optimizer that can be read here is"
                )
        if ".pre_quant_scale" in parts:
            fits(layer, ".pre_quant_scale", parts[".pre_quant_scale"].shape, [shape[1]])
        block = _block(layer, shape, scales.shape)
        return Coded(shape, _BITS[codes.dtype], block[0] * block[1])

    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The code times its scales, in float32."""
        codes, scales = parts[".weight"], parts[".weight_scale"]
        if codes.dtype != torch.uint8:
            weight = codes.float()
        elif scales.dtype in (torch.uint8, torch.float8_e4m3fn):
            weight = fp4(codes)
        else:
            signed = unpacked(codes.T.contiguous(), 4, 2 * len(codes)).T.float()
            weight = torch.where(signed > 7, signed - 16, signed)
        block = _block(layer, tuple(weight.shape), tuple(scales.shape))
        scales = powers_of_two(scales) if scales.dtype == torch.uint8 else scales.float()
        if parts[".weight_scale"].dtype == torch.float8_e4m3fn:
            scales = scales * parts[".weight_scale_2"].float()
        scales = scales.reshape([-(-size // step) for size, step in zip(weight.shape, block, strict=True)])
        weight *= spread(scales, tuple(weight.shape), block)
        return weight * parts[".pre_quant_scale"].float() if ".pre_quant_scale" in parts else weight


def _block(layer: str, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
    """Outputs and inputs that share a scale.

    Raises:
        BadInput: the scales do not divide the weight.
    """
    outputs, inputs = shape
    counts = [size for axis, size in enumerate(scales) if not (len(scales) == 4 and axis % 2)]
    rows, columns = (*counts, *(1, 1)[len(counts) :]) if len(counts) <= 2 else (0, 0)
    if not rows or not columns or outputs % rows or inputs % columns:
        raise BadInput(f"{layer}.weight_scale has the shape {list(scales)}, which does not divide {list(shape)}")
    return outputs // rows, inputs // columns
