"""Checkpoints of compressed-tensors (llm-compressor, vLLM): integers and small floats, packed or unpacked.

A layer is one of:

- ``weight_packed`` int32 ``[out, in * bits / 32]`` (``pack-quantized``): codes less ``-2 ** (bits - 1)``, one stream
  of bits a row, or in files of earlier versions as many whole codes a word as fit;
- ``weight_packed`` uint8 ``[out, in / 2]`` (``nvfp4-pack-quantized``, ``mxfp4-pack-quantized``): 4-bit floats, low
  half first;
- ``weight`` int8 or float8 ``[out, in]`` (``int-quantized``, ``float-quantized``, ``naive-quantized``,
  ``mxfp8-quantized``).

``weight_scale`` is one number, ``[out, 1]``, ``[out, groups]`` or one a block; ``weight_zero_point``, if present, has
the same shape, or is packed along the outputs. A weight is ``(code - zero) * scale``. NVFP4 scales are E4M3 over one
``weight_global_scale``; those of MXFP4 and MXFP8 are powers of two. ``weight_g_idx`` is the group of each input. The
library itself rounds these products to the type of the scale (bfloat16 in most files); here they are rounded only to
float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.base import Coded, Format, fits, needed, number, rounded_at_run_time
from knowledge_compression.models.checkpoints.codes import fp4, powers_of_two, spread, unpacked
from knowledge_compression.models.checkpoints.sparse import SparseTensors
from knowledge_compression.models.streamed import Described

PACKED, NVFP4, MXFP4 = "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"
MXFP8 = "mxfp8-quantized"
PLAIN = ("int-quantized", "float-quantized", "naive-quantized", MXFP8)
LAYOUTS = (PACKED, *PLAIN, NVFP4, MXFP4)
_PLAIN_TYPES = ("I8", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Scheme:
    """The storage of one group of layers.

    Attributes:
        targets: which layers: ``re:`` and a pattern, a path, or a class such as ``Linear``.
        layout: one of :data:`LAYOUTS`.
        bits: bits of a code.
        block: outputs and inputs of a block with one scale, if scales belong to blocks.
    """

    targets: Sequence[str]
    layout: str
    bits: int
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class CompressedTensors(Format):
    """compressed-tensors, see the module.

    Attributes:
        schemes: of the groups of layers whose weights are coded.
        version: version of the library that wrote the file.
        rounded: what else is rounded at run time.
    """

    schemes: Sequence[Scheme]
    version: str = ""
    rounded: Sequence[str] = ()

    name = "compressed-tensors"
    methods = ("compressed-tensors",)
    left_out = "ignore"
    mark = ".weight_scale"
    endings = (
        *(".weight_packed", ".weight", ".weight_scale", ".weight_zero_point"),
        *(".weight_shape", ".weight_g_idx", ".weight_global_scale"),
    )
    telling = (".weight_shape",)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> CompressedTensors | SparseTensors:  # type: ignore[override]
        """Its ``config_groups``; a sparse checkpoint has another layout."""
        sparse = settings.get("sparsity_config")
        if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
            return SparseTensors.of(settings)
        groups = settings.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise BadInput("its quantization_config has no config_groups, which describe how its layers are stored")
        whole = settings.get("format")
        _check_transforms(settings.get("transform_config"))
        inputs = {name for name, one in groups.items() if isinstance(one, Mapping) and one.get("input_activations")}
        # A group may round nothing but inputs, such as those of attention.
        coded = {name: one for name, one in groups.items() if name not in inputs or one.get("weights") is not None}
        rounded = ["activations"] if inputs else []
        rounded += ["keys and values"] if settings.get("kv_cache_scheme") else []
        version = str(settings.get("version") or "")
        return cls([_scheme(name, group, whole) for name, group in coded.items()], version, rounded)

    @property
    def made_by(self) -> str:
        """The version of the library that wrote the file."""
        return f"compressed-tensors {self.version}" if self.version else ""

    @property
    def notes(self) -> Sequence[str]:
        """A remark that nothing is rounded at run time here."""
        return rounded_at_run_time(self.rounded)

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """Shape from the codes, groups from the scales."""
        scheme = self._scheme(layer)
        codes = ".weight" if scheme.layout in PLAIN else ".weight_packed"
        needed(layer, parts, codes)
        if scheme.layout in PLAIN and parts[codes].dtype not in _PLAIN_TYPES:
            raise BadInput(
                f"{layer}.weight is {parts[codes].dtype} beside its scale, so it is not compressed yet; "
                f"{', '.join(_PLAIN_TYPES)} and packed weights can be read"
            )
        shape = _shape(layer, parts[codes].matrix(f"{layer}{codes}"), told.get(".weight_shape"), scheme)
        if scheme.layout == NVFP4:
            needed(layer, parts, ".weight_global_scale")
        block = _block(layer, shape, parts[".weight_scale"].shape, scheme)
        return Coded(shape, scheme.bits, block[0] * block[1])

    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """``(code - zero) * scale``, rounded once; NVFP4's scale over its global scale is rounded first."""
        scheme = self._scheme(layer)
        codes = parts[".weight" if scheme.layout in PLAIN else ".weight_packed"]
        shape = _shape(layer, (codes.shape[0], codes.shape[1]), parts.get(".weight_shape"), scheme)
        scales = parts[".weight_scale"]
        if scheme.layout in (MXFP4, MXFP8):
            scales = powers_of_two(scales)
        elif scheme.layout == NVFP4:
            scales = scales.float() / parts[".weight_global_scale"].float()
        block = _block(layer, shape, tuple(scales.shape), scheme)
        scales = scales.float().reshape([-(-size // step) for size, step in zip(shape, block, strict=True)])
        places = parts.get(".weight_g_idx")
        if places is None or bool((places < 0).any()):  # -1: in their own order
            each = partial(spread, shape=shape, block=block)
        elif int(places.max()) < scales.shape[1]:
            each = partial(torch.index_select, dim=1, index=places.int())
        else:
            raise BadInput(
                f"{layer}.weight_g_idx contains group {int(places.max())}, but there are only {scales.shape[1]} groups"
            )
        weight = _codes(codes, shape, scheme)
        if (zeros := parts.get(".weight_zero_point")) is not None:
            weight -= each(_zeros(zeros, scales, scheme))
        return weight.mul_(each(scales))

    def _scheme(self, layer: str) -> Scheme:
        """The scheme that names the layer, or the first pattern for it in the alphabet, as in the library; otherwise
        the one for a class, such as all linear layers.
        """
        targets = [(target, scheme) for scheme in self.schemes for target in scheme.targets]
        targets.sort(key=lambda one: (one[0].startswith("re:"), one[0]))
        named = (scheme for target, scheme in targets if _takes(target, layer))
        general = (scheme for scheme in self.schemes if any(target[:1].isupper() for target in scheme.targets))
        found = next(named, None) or next(general, None)
        if found is None:
            raise BadInput(f"it holds a scale for {layer}, which belongs to none of its config_groups")
        return found


def _takes(target: str, layer: str) -> bool:
    """Whether a target names a layer, by its path."""
    if target.startswith("re:"):
        return re.match(target[3:], layer) is not None
    return layer == target or layer.endswith(f".{target}")


def _check_transforms(told: Any) -> None:
    """Refuse files whose weights are those of another network until inputs or outputs are transformed as well.

    Raises:
        BadInput: there is such a transform.
    """
    groups = told.get("config_groups") if isinstance(told, Mapping) else None
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        places = group.get("apply") if isinstance(group, Mapping) else None
        for one in places if isinstance(places, list) else ():
            if isinstance(one, Mapping) and not str(one.get("location")).startswith("weight"):
                raise BadInput(
                    f"its quantization_config has transform_config.config_groups.{name}, which multiplies the "
                    f"{one.get('location')} of layers by a matrix at run time; files whose transforms are part of the "
                    f"weights can be read"
                )


def _scheme(name: str, group: Any, whole: Any) -> Scheme:
    """One of the ``config_groups``.

    Raises:
        BadInput: it is invalid, or its way of storing weights cannot be read.
    """
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise BadInput(f"its quantization_config has no settings of weights in config_groups.{name}")
    layout = group.get("format") or whole
    if layout not in LAYOUTS:
        raise BadInput(
            f"it is a compressed-tensors checkpoint in the layout {layout}; {', '.join(LAYOUTS)} can be read"
        )
    bits = number(weights, "num_bits", 8) or 8
    if layout == PACKED and not 1 <= bits <= 8:
        raise BadInput(f"its quantization_config has num_bits={bits} in config_groups.{name}; packed codes have 1 to 8")
    block = weights.get("block_structure")
    if block is not None and not (
        isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise BadInput(f"its quantization_config has block_structure={block!r}, which must be two sizes")
    return Scheme(
        targets=[str(target) for target in group.get("targets") or ()],
        layout=layout,
        bits=bits,
        block=None if block is None else (block[0], block[1]),
    )


def _shape(layer: str, codes: tuple[int, int], told: Tensor | None, scheme: Scheme) -> tuple[int, int]:
    """Outputs and inputs of the weight whose codes are stored as a tensor of this shape."""
    outputs, words = codes
    if scheme.layout in PLAIN:
        return codes
    if scheme.layout in (NVFP4, MXFP4):
        return outputs, 2 * words
    inputs = int(told.flatten()[-1]) if told is not None else words * (32 // scheme.bits)
    fitting = {-(-inputs * scheme.bits // 32), -(-inputs // (32 // scheme.bits))}
    if inputs < 1 or words not in fitting:
        raise BadInput(
            f"{layer}.weight_packed has {words} words per row, which does not fit {inputs} codes of {scheme.bits} bits"
        )
    return outputs, inputs


def _block(layer: str, shape: tuple[int, int], scales: Sequence[int], scheme: Scheme) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    count = math.prod(scales)
    if count == 1:
        return shape
    if len(scales) == 2 and scheme.block is not None:
        fits(layer, ".weight_scale", scales, [-(-n // b) for n, b in zip(shape, scheme.block, strict=True)])
        return scheme.block
    groups = count // shape[0]
    if scales[0] != shape[0] or not groups or shape[1] % groups:
        raise BadInput(f"{layer}.weight_scale has the shape {list(scales)}, which does not divide {list(shape)}")
    return 1, shape[1] // groups


def _codes(codes: Tensor, shape: tuple[int, int], scheme: Scheme) -> Tensor:
    """The codes as floats, before zero points are subtracted."""
    if scheme.layout in PLAIN:
        return codes.float()
    return fp4(codes) if scheme.layout in (NVFP4, MXFP4) else _integers(codes, scheme.bits, shape[1])


def _zeros(zeros: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """The zero points, in the shape of the scales."""
    if zeros.dtype == torch.int32 and scheme.layout == PACKED:
        return _integers(zeros.T, scheme.bits, len(scales)).T.reshape(scales.shape)
    return zeros.float().reshape(scales.shape)


def _integers(words: Tensor, bits: int, count: int) -> Tensor:
    """Signed codes ``[..., count]``, float32: one stream of bits, or whole codes in each word."""
    whole = 32 // bits
    if words.shape[-1] == -(-count * bits // 32):
        codes = unpacked(words, bits, count)
    else:
        codes = unpacked(words.contiguous()[..., None], bits, whole).flatten(-2)[..., :count]
    return codes.float() - 2 ** (bits - 1)
