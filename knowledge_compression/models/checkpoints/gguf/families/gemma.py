"""The content of GGUF files of Gemma."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from statistics import NormalDist
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf.architecture import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf.changes import PLUS_ONE, filled
from knowledge_compression.models.checkpoints.gguf.settings import (
    COMMON,
    LOCAL_BASE,
    ROOT,
    ROTARY,
    SCALED_WIDTHS,
    WIDTHS,
    WINDOWS,
    Setting,
    Settings,
    Told,
    of_attention,
)

_NORMS = {"norm.weight": PLUS_ONE}
_KEYS_OF_LAST = 20  # llama.cpp's number of the blocks of a Gemma 3n that have keys of their own
_SPARSE = 10  # and of those whose feed-forward networks are sparse
_NORMAL, _NONE = NormalDist(), float("-inf")


def _all_words(told: Told, tensors: Collection[str]) -> Mapping[str, Any]:
    return {"vocab_size_per_layer_input": told["vocab_size"]} if "vocab_size" in told else {}


def _shared_keys(config: Any) -> int:
    """The number of blocks of a Gemma 3n that take the keys of earlier ones.

    Raises:
        BadInput: llama.cpp assumes another number.
    """
    assumed = max(config.num_hidden_layers - _KEYS_OF_LAST, 0)
    if config.num_kv_shared_layers != assumed:
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} has num_kv_shared_layers={config.num_kv_shared_layers}; "
            f"llama.cpp assumes {assumed} in networks of {config.num_hidden_layers} blocks"
        )
    return assumed


def _sparsity(config: Any) -> list[float]:
    """The threshold of each block's feed-forward network, in standard deviations.

    Raises:
        BadInput: llama.cpp assumes others.
    """
    told = config.activation_sparsity_pattern
    if any(share != (0.95 if place < _SPARSE else 0.0) for place, share in enumerate(told)):
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} has activation_sparsity_pattern={told}; llama.cpp assumes "
            f"0.95 in the first {_SPARSE} blocks and 0 in the others"
        )
    return [_NORMAL.inv_cdf(share) if share else _NONE for share in told]


_ALL_BLOCKS: Settings = {**COMMON, **ROTARY, **LOCAL_BASE, **ROOT, **WINDOWS}
_GEMMA3N = GgufArchitecture(
    "gemma3n",
    {
        **_ALL_BLOCKS,
        **WIDTHS,
        "final_logit_softcapping": lambda config: config.final_logit_softcapping,  # llama.cpp has the usual one
        "altup.active_idx": lambda config: config.altup_active_idx,
        "altup.num_inputs": lambda config: config.altup_num_inputs,
        "embedding_length_per_layer_input": lambda config: config.hidden_size_per_layer_input,
        "attention.shared_kv_layers": Setting("num_kv_shared_layers", _shared_keys),
        "activation_sparsity_scale": Setting(
            "activation_sparsity_pattern",
            _sparsity,
            lambda value, _: [round(_NORMAL.cdf(one), 6) if one != _NONE else 0.0 for one in value],
        ),
    },
    {"per_layer_token_embd": filled("vocab_size")},
    frozenset({"altup_coef_clip", "vocab_size_per_layer_input"}),
    also=_all_words,
    stacked={
        r".*altup_projections\.(\d+)\.weight": "altup_proj.weight",
        r".*altup_unembed_projections\.(\d+)\.weight": "altup_unembd_proj.weight",
    },
)


def _widths(config: Any) -> list[int] | int:
    """The width of every feed-forward network, which may be double in blocks without keys of their own."""
    if not config.use_double_wide_mlp:
        return int(config.intermediate_size)
    first = config.num_hidden_layers - config.num_kv_shared_layers
    return [config.intermediate_size * (1 if place < first else 2) for place in range(config.num_hidden_layers)]


def _whole(attribute: str) -> Callable[[Any], int]:
    return lambda config: of_attention(config, attribute, "full_attention")


def _local(attribute: str) -> Callable[[Any], int]:
    return lambda config: of_attention(config, attribute, "sliding_attention")


def _keys(config: Any) -> list[int] | int:
    local, whole = _local("num_key_value_heads")(config), _whole("num_key_value_heads")(config)
    if local == whole:
        return int(local)
    return [local if kind == "sliding_attention" else whole for kind in config.layer_types]


def _one_direction(config: Any) -> None:
    """Nothing is written: texts are read in one direction, images matter to no text.

    Raises:
        BadInput: texts are read in both directions.
    """
    if config.use_bidirectional_attention == "all":
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} has use_bidirectional_attention=all; llama.cpp reads texts "
            "in one direction"
        )


def _gemma4(told: Told, tensors: Collection[str]) -> Mapping[str, Any]:
    """The settings of blocks with full attention, and what the shapes of all blocks tell."""
    kinds, keys = told["layer_types"], told["num_key_value_heads"]
    of = dict(zip(kinds, keys, strict=True)) if isinstance(keys, list) else {}
    local = of.get("sliding_attention", max(of.values())) if of else keys
    whole = {"head_dim": told["global_head_dim"]}
    whole |= {"num_key_value_heads": of["full_attention"]} if of.get("full_attention", local) != local else {}
    places = [place for place, kind in enumerate(kinds) if kind == "full_attention"]
    widths = told["intermediate_size"]
    shared = [place for place in places if f"blk.{place}.attn_k.weight" in tensors]
    return {
        **_all_words(told, tensors),
        "per_layer_config": dict.fromkeys(places, whole),
        "num_key_value_heads": local,
        "intermediate_size": min(widths) if isinstance(widths, list) else widths,
        "use_double_wide_mlp": isinstance(widths, list) and len(set(widths)) > 1,
        "attention_k_eq_v": any(f"blk.{place}.attn_v.weight" not in tensors for place in shared),
    }


_GEMMA4 = GgufArchitecture(
    "gemma4",
    {
        **_ALL_BLOCKS,
        "feed_forward_length": Setting("intermediate_size", _widths),
        "attention.head_count_kv": Setting("num_key_value_heads", _keys),
        "attention.key_length": Setting("global_head_dim", _whole("head_dim")),
        "attention.value_length": _whole("head_dim"),
        "final_logit_softcapping": Setting(  # without a number, llama.cpp takes 30
            "final_logit_softcapping",
            lambda config: config.final_logit_softcapping or 0.0,
            lambda value, _: float(value) or None,
        ),
        "attention.key_length_swa": Setting("head_dim", _local("head_dim")),
        "attention.value_length_swa": _local("head_dim"),
        "attention.shared_kv_layers": "num_kv_shared_layers",
        "rope.dimension_count": _whole("head_dim"),
        "rope.dimension_count_swa": _local("head_dim"),
        "embedding_length_per_layer_input": Setting(
            "hidden_size_per_layer_input", lambda config: getattr(config, "hidden_size_per_layer_input", None) or 0
        ),
        "expert_count": "num_experts",
        "expert_used_count": "top_k_experts",
        "expert_feed_forward_length": "moe_intermediate_size",
        "directions": _one_direction,
    },
    {"per_layer_token_embd": filled("vocab_size")},
    frozenset({"vocab_size_per_layer_input", "use_bidirectional_attention"}),
    present={"enable_moe_block": "ffn_gate_inp"},
    also=_gemma4,
    further={
        r".*layers\.(\d+)\.experts\.gate_up_proj": ("blk.{}.ffn_gate_up_exps.weight",),
        r".*layers\.(\d+)\.experts\.down_proj": ("blk.{}.ffn_down_exps.weight",),
        r".*layers\.(\d+)\.router\.scale": ("blk.{}.ffn_gate_inp.scale",),
        r".*layers\.(\d+)\.router\.per_expert_scale": ("blk.{}.ffn_down_exps.scale",),
    },
)

GEMMAS: Mapping[str, GgufArchitecture] = {
    "gemma": GgufArchitecture("gemma", {**COMMON, **ROTARY, **WIDTHS, **ROOT}, _NORMS),
    "gemma2": GgufArchitecture(
        "gemma2",
        {
            **COMMON,
            **ROTARY,
            **SCALED_WIDTHS,
            **ROOT,
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        _NORMS,
    ),
    "gemma3_text": GgufArchitecture(
        "gemma3",
        {
            **COMMON,
            **ROTARY,
            **LOCAL_BASE,
            **SCALED_WIDTHS,
            **ROOT,
            "attention.sliding_window": "sliding_window",
        },
        _NORMS,
    ),
    "gemma3n_text": _GEMMA3N,
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,  # the same without experts and inputs of each layer; read as the former
}
