"""An architecture as GGUF describes it: the names of its tensors, its settings, and how its tensors differ from the
network's. The descriptions themselves are in ``families``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers.pytorch_utils import Conv1D

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf.changes import UNCHANGED, Array, Change
from knowledge_compression.models.checkpoints.gguf.rope import FREQUENCIES, llama3_divisors, proportional_divisors
from knowledge_compression.models.checkpoints.gguf.settings import (
    FLOATS,
    Setting,
    Settings,
    of_attention,
    rotated,
)
from knowledge_compression.models.checkpoints.gguf.unwritten import reason_against
from knowledge_compression.models.families import ENCODER, family_of

# Parameters of networks that gguf's table lacks, because transformers stores them differently in its own files.
_FURTHER_NAMES: Mapping[str, Sequence[str]] = {
    r".*layers\.(\d+)\.\w+\.experts\.gate_up_proj": ("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight"),
    r".*layers\.(\d+)\.\w+\.experts\.down_proj": ("blk.{}.ffn_down_exps.weight",),
    r".*layers\.(\d+)\.block_sparse_moe\.router\.weight": ("blk.{}.ffn_gate_inp.weight",),
    r".*layers\.(\d+)\.shared_mlp\.input_linear\.weight": (
        "blk.{}.ffn_gate_shexp.weight",
        "blk.{}.ffn_up_shexp.weight",
    ),
    r".*layers\.(\d+)\.(?:linear_attn|mixer|mamba)\.dt_bias": ("blk.{}.ssm_dt.bias",),
    r".*layers\.(\d+)\.\w+(?:\.gate|\.moe_statics|\.gate\.moe_statics)?\.(?:e_score_correction|expert)_bias": (
        "blk.{}.exp_probs_b.bias",
    ),
    r".*layers\.(\d+)\.mlp\.experts\.gate_up_proj_bias": ("blk.{}.ffn_gate_exps.bias", "blk.{}.ffn_up_exps.bias"),
    r".*layers\.(\d+)\.mlp\.experts\.down_proj_bias": ("blk.{}.ffn_down_exps.bias",),
    r".*layers\.(\d+)\.linear_attn\.in_proj_qkvz\.weight": ("blk.{}.attn_qkv.weight", "blk.{}.attn_gate.weight"),
    r".*layers\.(\d+)\.self_attn\.kv_b_proj\.weight": ("blk.{}.attn_k_b.weight", "blk.{}.attn_v_b.weight"),
}
_WITHOUT_ENDING = (".ssm_a", ".ssm_d")
_TURNED = ("Llama4TextExperts",)  # banks that transformers does not declare


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture as GGUF describes it.

    Attributes:
        name: GGUF's name for it.
        settings: the settings of a configuration that a file holds.
        changes: the changes of tensors whose name in the file contains the key; the first that matches applies.
        covers: attributes of the configuration that functions in ``settings`` read; no answer depends on them in any
            other way.
        given: attributes that every file of this architecture implies.
        present: attributes that are true if the file has a tensor whose name contains the text; with three values: the
            text, and the attribute's value with and without such a tensor.
        also: attributes that follow from those read and the names of the file's tensors.
        marks: text in names of tensors or settings that distinguishes files of this model type from others with the
            same architecture; empty for the type without such names.
        further: tensors of parameters that gguf's table lacks or names differently, as in :data:`_FURTHER_NAMES`.
        stacked: parameters of which one tensor holds several: a pattern of their names, which tells the place of each,
            and the tensor.
        numbers: keys that hold one number of each block, and the ending of the parameter's name.
        others: networks of the same model type that GGUF describes differently: whether a configuration is one of
            them, and the description.
    """

    name: str
    settings: Settings
    changes: Mapping[str, Change] = field(default_factory=dict)
    covers: frozenset[str] = frozenset()
    given: Mapping[str, Any] = field(default_factory=dict)
    present: Mapping[str, str | tuple[str, Any, Any]] = field(default_factory=dict)
    also: Callable[[Mapping[str, Any], Collection[str]], Mapping[str, Any]] | None = None
    marks: str = ""
    further: Mapping[str, Sequence[str]] = field(default_factory=dict)
    stacked: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[tuple[Callable[[Any], bool], GgufArchitecture]] = ()

    def values(self, config: Any) -> Iterator[tuple[str, Any]]:
        """Every key with its value."""
        for key, source in self.settings.items():
            if isinstance(source, str):
                value = getattr(config, source, None)
            else:
                value = source.stored(config) if isinstance(source, Setting) else source(config)
            if value is not None:
                whole = key.endswith(FLOATS) and isinstance(value, int)
                yield f"{self.name}.{key}", float(value) if whole else value

    def told(self, stored: Mapping[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """The attributes of a configuration for a file's settings and the names of its tensors."""
        found: dict[str, Any] = dict(self.given)
        stored = _without_further_blocks(self.name, stored)
        for key, source in self.settings.items():
            value = stored.get(f"{self.name}.{key}")
            if value is None or not isinstance(source, str | Setting):
                continue
            setting = Setting(source) if isinstance(source, str) else source
            found[setting.attribute] = setting.loaded(value, found)
        for attribute, means in self.present.items():
            part, there, missing = (means, True, False) if isinstance(means, str) else means
            found[attribute] = there if any(part in name for name in tensors) else missing
        return found | dict(self.also(found, tensors) if self.also else {})

    def number(self, name: str) -> tuple[str, int] | None:
        """The setting that holds a parameter of one number, and the block's place in it; None for other parameters."""
        key = next((key for key, ending in self.numbers.items() if name.endswith(ending)), None)
        block = re.search(r"layers\.(\d+)\.", name)
        return None if key is None or block is None else (key, int(block[1]))

    def place(self, name: str) -> int | None:
        """The place of a parameter in the tensor that holds several; None if it has a tensor of its own."""
        found = next((match for form in self.stacked if (match := re.fullmatch(form, name))), None)
        return None if found is None else int(found[1])

    def change(self, name: str) -> Change | None:
        """The change between a tensor of the file and the network's; None if they are equal."""
        return next((change for part, change in self.changes.items() if part in name), None)

    def changed(self, name: str, tensor: Array, config: Any) -> Array:
        """The tensor in the file's form."""
        change = self.change(name)
        return tensor if change is None or change.idle(config) else change.store(tensor, config)

    def put_together(self, tensors: Sequence[tuple[str, Array]], config: Any) -> Array:
        """The network's parameter that the given tensors of the file form, by their names."""
        changes = [self.change(name) or UNCHANGED for name, _ in tensors]
        loaded = [change.load(tensor, config) for change, (_, tensor) in zip(changes, tensors, strict=True)]
        return loaded[0] if len(loaded) == 1 else changes[0].join(loaded)

    def names(self, network: Any) -> dict[str, Sequence[str]]:
        """Each parameter of a network, and the tensors of the file that hold it, in the order of its rows."""
        kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == self.name)
        config = network.config
        blocks = max(config.num_hidden_layers, getattr(config, "num_decoder_layers", None) or 0)
        table = get_tensor_name_map(kind, blocks)
        found: dict[str, Sequence[str]] = {}
        forms: list[tuple[str, Sequence[str]]] = [(form, (tensor,)) for form, tensor in self.stacked.items()]
        forms += [*self.further.items(), *_FURTHER_NAMES.items()]  # the first that matches applies
        for name in network.state_dict():
            if further := next((n for form, n in forms if re.fullmatch(form, name)), None):
                block = re.search(r"layers\.(\d+)\.", name)
                found[name] = tuple(one.format(block[1]) if block else one for one in further)
                continue
            stem, ending = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name).groups()  # type: ignore[union-attr]
            # Some files were converted from the inner network, without the head.
            told = table.get_name(stem) or table.get_name(stem.partition(".")[2])
            if told is not None:
                found[name] = (told + (ending or ("" if told.endswith(_WITHOUT_ENDING) else ".weight")),)
        return found


def _without_further_blocks(architecture: str, stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings without a file's last blocks that predict tokens after the next, which transformers leaves out."""
    count, further = (stored.get(f"{architecture}.{key}") for key in ("block_count", "nextn_predict_layers"))
    if not further or not isinstance(count, int):
        return stored
    each = {key: value[:-further] for key, value in stored.items() if isinstance(value, list) and len(value) == count}
    return {**stored, **each, f"{architecture}.block_count": count - further}


def is_turned(network: Any, name: str) -> bool:
    """Whether a parameter is ``[..., in_features, out_features]``: GPT-2's Conv1D, and some banks of experts."""
    module = network.get_submodule(name.rpartition(".")[0])
    if isinstance(module, Conv1D):
        return name.endswith(".weight")
    turned = getattr(module, "is_transposed", type(module).__name__ in _TURNED)
    return bool(turned) and name.endswith("_proj")


def further_tensors(config: Any) -> dict[str, Array]:
    """Tensors of a file that hold settings of the network, or that llama.cpp requires without reading them."""
    told = getattr(config, "rope_parameters", None) or {}
    found: dict[str, Array] = {}
    if told.get("rope_type") == "llama3":
        found[FREQUENCIES] = llama3_divisors(told, rotated(config))
    if config.model_type in ("gemma4_text", "gemma4_unified_text"):
        found[FREQUENCIES] = proportional_divisors(
            told["full_attention"], of_attention(config, "head_dim", "full_attention")
        )
    if config.model_type == "gemma3n_text":  # blocks that take the keys of earlier ones
        rows = config.num_key_value_heads * config.head_dim
        for block in range(config.num_hidden_layers - config.num_kv_shared_layers, config.num_hidden_layers):
            found |= {
                f"blk.{block}.attn_{one}.weight": np.zeros((rows, config.hidden_size), np.float16) for one in "kv"
            }
            found[f"blk.{block}.attn_k_norm.weight"] = np.zeros(config.head_dim, np.float32)
    return found


def architecture_for(config: Any) -> GgufArchitecture:
    """How GGUF describes networks of this configuration.

    Raises:
        BadInput: there is no description of it.
    """
    from knowledge_compression.models.checkpoints.gguf.families import ARCHITECTURES

    if family_of(config) == ENCODER:
        raise BadInput(
            f"output.save_model=gguf: GGUF files have no tensors for the head by which {config.model_type} fills "
            "blanks; choose output.save_model=true"
        )
    if (found := ARCHITECTURES.get(config.model_type)) is None:
        raise BadInput(
            f"output.save_model=gguf cannot write models of the type {config.model_type}: "
            f"{reason_against(config.model_type)}; it writes {', '.join(sorted(ARCHITECTURES))}"
        )
    return next((other for holds, other in found.others if holds(config)), found)


def architecture_in(name: str, keys: Collection[str]) -> tuple[str, GgufArchitecture] | None:
    """The model type and description of a file's architecture; None if there is none here.

    Args:
        name: GGUF's name for it.
        keys: names of the file's tensors and settings.
    """
    from knowledge_compression.models.checkpoints.gguf.families import ARCHITECTURES

    # Types of a single description come first: only these read a file of an architecture that several types share.
    every = [(kind, one) for kind, one in ARCHITECTURES.items()]
    every += [(kind, other) for kind, one in ARCHITECTURES.items() for _, other in one.others]
    there = [(kind, one) for kind, one in every if one.name == name]
    marked = [pair for pair in there if pair[1].marks and any(pair[1].marks in key for key in keys)]
    plain = [pair for pair in there if not pair[1].marks]
    return next(iter(marked + plain), None)
