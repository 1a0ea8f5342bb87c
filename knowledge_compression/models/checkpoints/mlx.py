"""Checkpoints of mlx-lm (0.32, with MLX 0.32): Apple's framework, whose converted models have names of their own.

A layer, an embedding too, is ``weight`` uint32 ``[out, in * bits / 32]``, one stream of bits a row, with

- ``affine``: ``scales`` and ``biases`` ``[out, in / group]`` in the model's type; a weight is ``code * scale + bias``;
- ``mxfp4``, ``mxfp8``: 4-bit floats or E4M3 and ``scales`` uint8, powers of two (OCP Microscaling Formats, v1.0);
- ``nvfp4``: 4-bit floats and ``scales`` uint8, which are E4M3 numbers.

MLX itself rounds the product to the type of the scale; here it is rounded only to float32. Settings are
``quantization`` in ``config.json``: bits, group and mode of all layers, and of single ones by their path.

mlx-lm renames, stacks, turns and shifts some of the published tensors when it converts a model, differently for every
type of model, and states none of it in the file. :data:`TYPES` is what it does to those types for which this was
checked by running it (``tests/models/test_format_peers.py``); other types are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.base import Coded, Format, fits, needed, number, rounded_at_run_time
from knowledge_compression.models.checkpoints.codes import fp4, powers_of_two, unpacked
from knowledge_compression.models.streamed import Described

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AFFINE = "affine"
_DEFAULTS = {AFFINE: (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # group and bits of each mode
_CONVOLUTIONS = (".conv1d.weight", ".conv.conv.weight")


@dataclass(frozen=True)
class Conversion:
    """What mlx-lm does to the tensors of one type of model; by default nothing.

    Attributes:
        bank: what replaces ``experts.N`` in the names of stacked experts; empty if it stacks none.
        projections: published names of an expert's projections, where mlx-lm renames them.
        wrapped: whether the model has parts for pictures or sound, of which the files hold only the text part, as
            ``language_model``.
        turned: whether convolutions ``[channels, 1, width]`` become ``[channels, width, 1]``.
        raised: endings of the norms' weights to which it adds 1.
    """

    bank: str = ""
    projections: Mapping[str, str] = field(default_factory=dict)
    wrapped: bool = False
    turned: bool = False
    raised: tuple[str, ...] = ()


_NORMS = (
    *(".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight"),
    *(".q_norm.weight", ".k_norm.weight"),
)
TYPES: Mapping[str, Conversion] = {
    **dict.fromkeys(
        (
            *("cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gemma4_text", "glm", "glm4"),
            *("gpt_bigcode", "granite", "helium", "hunyuan_v1_dense", "llama", "ministral3", "mistral", "nemotron"),
            *("olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2"),
        ),
        Conversion(),
    ),
    **dict.fromkeys(("lfm2", "mamba"), Conversion(turned=True)),
    **dict.fromkeys(("glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe"), Conversion("switch_mlp")),
    "dots1": Conversion("experts"),
    **dict.fromkeys(("gemma3", "gemma4"), Conversion(wrapped=True)),
    "jamba": Conversion("switch_mlp", turned=True),
    "mixtral": Conversion("switch_mlp", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}),
    "qwen3_5": Conversion(wrapped=True, turned=True, raised=_NORMS),
    "qwen3_next": Conversion("switch_mlp", turned=True, raised=_NORMS),
}


@dataclass(frozen=True)
class Coding:
    """How a layer is coded: one of the modes of :data:`_DEFAULTS`, its group and bits."""

    mode: str
    group: int
    bits: int


@dataclass(frozen=True)
class Mlx(Format):
    """mlx-lm's format, see the module's docstring.

    Attributes:
        conversion: what mlx-lm did to the published tensors.
        default: coding of layers without settings of their own; None if all weights are floats.
        apart: coding of single layers, by their paths.
        rounded: whether inputs are rounded at run time.
    """

    conversion: Conversion
    default: Coding | None
    apart: Mapping[str, Coding]
    rounded: bool = False

    name = "mlx"
    methods = ("mlx",)
    mark = ".scales"
    endings = (".weight", ".scales", ".biases")
    left_out = "quantization"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Mlx:
        """The type of the model, and ``quantization``.

        Raises:
            BadInput: what mlx-lm does to this type of model is not known, or a mode or a size is none of MLX's.
        """
        kind = str(settings.get("model_type"))
        if kind not in TYPES:
            raise BadInput(
                f"it was converted by mlx-lm, which changes the tensors of each type of model differently, and has the "
                f"type {kind!r}; {', '.join(sorted(TYPES))} can be read, and the files that it was converted from"
            )
        each = {path: one for path, one in settings.items() if isinstance(one, Mapping)}
        return cls(
            TYPES[kind],
            _coding(settings) if "bits" in settings or "group_size" in settings else None,
            {path: _coding(one) for path, one in each.items()},
            any(one.get("quantize_input") for one in (settings, *each.values())),
        )

    @property
    def may_be_floats(self) -> bool:
        """Whether the settings code no layer."""
        return self.default is None

    @property
    def notes(self) -> Sequence[str]:
        """A remark that inputs are not rounded here."""
        return rounded_at_run_time(["inputs"] if self.rounded else [])

    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """Shape from the scales, which say how many groups there are."""
        needed(layer, parts, *self._endings(layer))
        coding, codes, scales = self._coding(layer), parts[".weight"], parts[".scales"].shape
        if codes.dtype != "U32" or len(codes.shape) not in (2, 3):
            raise BadInput(f"{layer}.weight is {codes.dtype} {list(codes.shape)}; MLX packs codes into words (U32)")
        inputs = coding.group * scales[-1]
        fits(layer, ".weight", codes.shape, [*scales[:-1], inputs * coding.bits // 32])
        if coding.mode == AFFINE:
            fits(layer, ".biases", parts[".biases"].shape, scales)
        return Coded((*scales[:-1], inputs), coding.bits, coding.group)

    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """``code * scale + bias``, or a small float times its scale."""
        coding, scales = self._coding(layer), parts[".scales"]
        count = coding.group * scales.shape[-1]
        words = parts[".weight"].view(torch.int32)
        if coding.mode == AFFINE:
            codes, scales = unpacked(words, coding.bits, count).float(), scales.float()
        else:
            packed = words.contiguous().view(torch.uint8)
            codes = packed.view(torch.float8_e4m3fn).float() if coding.bits == 8 else fp4(packed)
            scales = scales.view(torch.float8_e4m3fn).float() if coding.mode == "nvfp4" else powers_of_two(scales)
        weight = codes.unflatten(-1, (-1, coding.group)).mul_(scales[..., None])
        if coding.mode == AFFINE:
            weight += parts[".biases"].float()[..., None]
        return weight.flatten(-2)

    def configuration(self, config: PretrainedConfig) -> PretrainedConfig:
        """That of the text part, if the files hold nothing else."""
        return config.get_text_config() if self.conversion.wrapped else config

    def published(self, name: str, shape: Sequence[int]) -> Sequence[str]:
        """The name before mlx-lm's conversion; of a bank of experts, that of each expert."""
        if self.conversion.wrapped:
            name = name.removeprefix("language_model.")
        bank = self.conversion.bank
        found = re.fullmatch(rf"(.*)\.{bank}\.(\w+)\.weight", name) if bank and len(shape) == 3 else None
        if found is None:
            return [name]
        theirs = self.conversion.projections.get(found[2], found[2])
        return [f"{found[1]}.experts.{expert}.{theirs}.weight" for expert in range(shape[0])]

    def restored(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor before mlx-lm turned or raised it."""
        if self.conversion.turned and name.endswith(_CONVOLUTIONS):
            return tensor.transpose(1, 2).contiguous()
        return tensor - 1 if name.endswith(self.conversion.raised) else tensor

    def _coding(self, layer: str) -> Coding:
        if (found := self.apart.get(layer, self.default)) is None:
            raise BadInput(f"it holds {layer}.scales, but its config.json has no settings for that layer's codes")
        return found

    def _endings(self, layer: str) -> tuple[str, ...]:
        return self.endings if self._coding(layer).mode == AFFINE else self.endings[:2]


def settings_in(config: Mapping[str, Any], writer: str | None = None) -> Mapping[str, Any] | None:
    """What a model's ``config.json`` says of mlx-lm's conversion; None if it was not converted, or nothing was changed.

    Args:
        config: the content of the file.
        writer: the format that the metadata of its weights name; floats are told from others by nothing else.
    """
    kind, quantization, others = (config.get(name) for name in ("model_type", "quantization", "quantization_config"))
    named = {"quant_method": "mlx", "model_type": kind}
    declared = isinstance(others, Mapping) and "quant_method" in others
    if isinstance(quantization, Mapping) and "bits" in quantization and not declared:  # TensorRT-LLM has no bits there
        return {**quantization, **named}
    return named if writer == "mlx" and others is None and TYPES.get(str(kind)) != Conversion() else None


def _coding(settings: Mapping[str, Any]) -> Coding:
    """The coding that settings state.

    Raises:
        BadInput: MLX has no such mode, or the sizes do not fit each other.
    """
    mode = settings.get("mode", AFFINE)
    if mode not in _DEFAULTS:
        raise BadInput(f"its quantization has mode={mode!r}; MLX has {', '.join(_DEFAULTS)}")
    group, bits = _DEFAULTS[mode]
    group = number(settings, "group_size", group) or group
    bits = number(settings, "bits", bits) or bits
    if not 1 <= bits <= 8 or group < 1 or group * bits % 32 or (mode != AFFINE and (group, bits) != _DEFAULTS[mode]):
        raise BadInput(f"its quantization has group_size={group} and bits={bits}, which {mode} of MLX cannot have")
    return Coding(mode, group, bits)
