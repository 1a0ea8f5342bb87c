"""Quantized models in the packed GPTQ checkpoint format, which transformers and GPTQModel load.

Each quantized linear ``<path>`` is stored, instead of its weight, as

- ``qweight``, int32 ``[in_features * bits / 32, out_features]``: the codes, packed along the inputs;
- ``qzeros``, int32 ``[groups, out_features * bits / 32]``: the zero points, packed along the outputs;
- ``scales``, float16 ``[groups, out_features]``;
- ``g_idx``, int32 ``[in_features]``: the group of each input;
- ``bias``, float16, if there is one.

Packed codes are one stream of bits, the first code in the lowest bits of the first word; a 3-bit code may lie in two
words. ``checkpoint_format=gptq`` stores every zero point minus one, so that a zero point of 0 does not fit; asymmetric
grids are therefore written as ``gptq_v2``, which stores zero points unchanged. Everything that is not quantized is
stored in float16.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.compression.solve.grid import SCALE_BITS, QuantizedWeight, quantized_weight
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, TargetLayer
from knowledge_compression.models.families import FINAL, TRANSFORM
from knowledge_compression.models.saving import full_state, write_checkpoint
from knowledge_compression.models.targets import linear_layers


def save_packed(model: Model, folder: Path) -> None:
    """Save a model with quantized linears in packed form.

    Args:
        model: quantized by ``gptq``, ``rtn`` or another method that leaves a
            :class:`~knowledge_compression.compression.solve.grid.QuantizedWeight` with its layers.
        folder: where to write; replaced if it exists.

    Raises:
        BadInput: no layer is quantized to integers, the scales are wider than the format's, the layers differ in bits
            or group size, or a layer's size does not fill whole words.
    """
    layers = linear_layers(model)
    packed = {layer: found for layer in layers if (found := quantized_weight(layer)) is not None}
    if not packed:
        raise BadInput(
            f"{model.name} has no layer with integers behind its weights to pack; output.save_model=packed takes "
            "compression=gptq or rtn as the last step"
        )
    if fused := [layer.path for layer in packed if layer.expert or not layer.is_replaceable]:
        raise BadInput(
            f"a packed checkpoint holds linear layers, and {fused[0]} is one of {len(fused)} experts or routers that "
            "are none; choose output.save_model=true, or a target without them, e.g. target=att"
        )
    if any(weight.grid.scale_bits != SCALE_BITS for weight in packed.values()):
        raise BadInput("a packed checkpoint holds scales of 16 bits; choose compression.scale_bits=16")
    if uneven := [layer.path for layer, weight in packed.items() if not weight.grid.groups_alike]:
        raise BadInput(
            f"a packed checkpoint has groups of one size, but the last of {uneven[0]} is shorter; "
            "choose a compression.group_size that divides its inputs"
        )
    config = _quantization_config(packed, [layer for layer in layers if layer not in packed])
    as_before = config["checkpoint_format"] == "gptq"
    state = {name: _half(tensor) for name, tensor in full_state(model.network).items()}
    for layer, weight in packed.items():
        del state[f"{layer.path}.weight"]
        fields = packed_fields(layer.path, weight, zero_offset=1 if as_before else 0)
        state |= {f"{layer.path}.{name}": tensor for name, tensor in fields.items()}
    extra = {"quantize_config.json": json.dumps(config, indent=2) + "\n"}
    write_checkpoint(model, folder, state, {"quantization_config": config, "dtype": "float16"}, extra)


def packed_fields(path: str, weight: QuantizedWeight, *, zero_offset: int) -> dict[str, Tensor]:
    """The tensors of one layer, except its bias.

    Args:
        path: of the layer, for messages.
        weight: the layer's integers.
        zero_offset: subtracted from every zero point before packing.

    Raises:
        BadInput: the inputs or outputs do not fill whole 32-bit words.
    """
    for name, count in zip(("outputs", "inputs"), weight.codes.shape, strict=True):
        if count * weight.grid.bits % 32:
            raise BadInput(f"the {count} {name} of {path} do not fill whole words with {weight.grid.bits} bits each")
    return {
        "qweight": pack(weight.codes.T, weight.grid.bits),
        "qzeros": pack(weight.grid.zeros - zero_offset, weight.grid.bits).T.contiguous(),
        "scales": weight.grid.scales.T.half().contiguous(),
        "g_idx": weight.grid.group_of.clone(),
    }


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack each column of ``[count, columns]`` as one bit stream, int32 ``[count * bits / 32, columns]``."""
    run = math.lcm(32, bits) // bits  # number of codes that together fill whole words
    groups = codes.to(torch.int64).unflatten(0, (-1, run))
    words = torch.zeros(len(groups), run * bits // 32, codes.shape[1], dtype=torch.int64)
    for i in range(run):
        word, shift = divmod(i * bits, 32)
        shifted = groups[:, i] << shift
        words[:, word] |= shifted & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= shifted >> 32
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).flatten(0, 1)


def _quantization_config(packed: dict[TargetLayer, QuantizedWeight], left: list[TargetLayer]) -> dict[str, Any]:
    grids = [weight.grid for weight in packed.values()]
    whole = all(grid.scales.shape[1] == 1 for grid in grids)  # then every row is one group, whatever its length
    kinds = {(g.bits, g.symmetric, -1 if whole else len(g.group_of) // g.scales.shape[1]) for g in grids}
    if len(kinds) > 1:
        raise BadInput(f"a packed checkpoint has one width and group size, but the layers have {sorted(kinds)}")
    ((bits, symmetric, size),) = kinds
    in_order = all(torch.equal(g.group_of, g.group_of.sort().values) for g in grids)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "sym": symmetric,
        "desc_act": not in_order,
        "lm_head": any(layer.role == FINAL for layer in packed),
        "pack_dtype": "int32",
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "meta": {"quantizer": ["knowledge_compression"]},
    }
    if skipped := [layer.path for layer in left if layer.role not in (FINAL, TRANSFORM)]:
        config["dynamic"] = {f"-:^{path}$".replace(".", r"\."): {} for path in skipped}
    return config


def _half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
