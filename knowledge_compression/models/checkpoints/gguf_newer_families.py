"""The content of GGUF files for architectures of 2024 and later, as ``gguf_families.py`` describes the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf_architectures import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf_changes import (
    BANK_HALVES,
    GATE_AND_UP_IN_TURN,
    LATENT,
    WITHOUT_MIDDLE,
)
from knowledge_compression.models.checkpoints.gguf_settings import (
    COMMON,
    LOCAL_EXPERTS,
    ROOT,
    ROTARY,
    WIDTHS,
    YARN,
    Setting,
    Settings,
    Told,
)

_SOFTMAX, _SIGMOID = 1, 2  # llama.cpp's numbers for how a router's scores become weights
_ROUTED: Settings = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "leading_dense_block_count": "first_k_dense_replace",
}


def _without(settings: Settings, *keys: str) -> Settings:
    return {key: value for key, value in settings.items() if key not in keys}


def _window_of_64_blocks(config: Any) -> int | None:
    """EXAONE 4's window, which llama.cpp uses only in a network of 64 blocks.

    Raises:
        BadInput: this network has another number of blocks.
    """
    if config.sliding_window is not None and config.num_hidden_layers != 64:
        raise BadInput(
            f"output.save_model=gguf: exaone4 has sliding_window={config.sliding_window} in {config.num_hidden_layers} "
            "blocks; llama.cpp takes a window only in 64 blocks"
        )
    return config.sliding_window


def _latent_queries(config: Any) -> int | None:
    """The width of DeepSeek's latent queries, without which llama.cpp knows networks of 26 and 27 blocks only.

    Raises:
        BadInput: this network has none, and another number of blocks.
    """
    if config.q_lora_rank is None and config.num_hidden_layers not in (26, 27):
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} has q_lora_rank=None in {config.num_hidden_layers} blocks; "
            "llama.cpp takes that only in 26 or 27 blocks"
        )
    return config.q_lora_rank


def _keys_of_blocks() -> Setting:
    """The number of key heads of each block, 0 in blocks of convolutions."""

    def store(config: Any) -> list[int]:
        return [0 if one == "conv" else config.num_key_value_heads for one in config.layer_types]

    def load(value: Any, told: Told) -> list[int]:
        return list(value)

    return Setting("num_key_value_heads", store, load)


def _blocks_of(keys: Mapping[str, Any]) -> Mapping[str, Any]:
    counts = keys["num_key_value_heads"]
    return {
        "num_key_value_heads": max(counts),
        "layer_types": ["full_attention" if count else "conv" for count in counts],
        "full_attn_idxs": [place for place, count in enumerate(counts) if count],
    }


def _narrowed(config: Any) -> int:
    """The width of LFM2's feed-forward layers, which its configuration may state before a rule reduces it."""
    width = config.intermediate_size
    if not config.block_auto_adjust_ff_dim:
        return int(width)
    width = int(2 * width / 3)
    if config.block_ffn_dim_multiplier is not None:
        width = int(config.block_ffn_dim_multiplier * width)
    return int(config.block_multiple_of * -(-width // config.block_multiple_of))


_LFM2: Settings = {
    **_without(COMMON, "feed_forward_length", "attention.head_count_kv"),
    **ROTARY,
    "attention.head_count_kv": _keys_of_blocks(),
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "shortconv.l_cache": "conv_L_cache",
}
_DEEPSEEK = GgufArchitecture(
    "deepseek2",
    {
        **_without(COMMON, "attention.head_count_kv"),
        **ROTARY,
        **YARN,
        **ROOT,
        **_ROUTED,
        "attention.head_count_kv": lambda config: 1,  # a file's keys are latent vectors, which all heads share
        "attention.q_lora_rank": Setting("q_lora_rank", _latent_queries),
        "attention.kv_lora_rank": "kv_lora_rank",
        "rope.dimension_count": "qk_rope_head_dim",
        "attention.key_length": lambda config: config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": lambda config: config.kv_lora_rank,
        "attention.key_length_mla": Setting(
            "qk_nope_head_dim",
            lambda config: config.qk_nope_head_dim + config.qk_rope_head_dim,
            lambda value, told: value - told["qk_rope_head_dim"],
        ),
        "attention.value_length_mla": "v_head_dim",
    },
    {**BANK_HALVES, **LATENT},
    given={"q_lora_rank": None},
    also=lambda told: {"num_key_value_heads": told["num_attention_heads"]},
)

NEWER: Mapping[str, GgufArchitecture] = {
    "exaone4": GgufArchitecture(
        "exaone4",
        {
            **COMMON,
            **ROTARY,
            **ROOT,
            "attention.sliding_window": Setting("sliding_window", _window_of_64_blocks),
        },
        given={"sliding_window": None},
        also=lambda told: (
            {} if told["sliding_window"] else {"layer_types": ["full_attention"] * told["num_hidden_layers"]}
        ),
    ),
    "gpt_oss": GgufArchitecture(
        "gpt-oss",
        {
            **COMMON,
            **ROTARY,
            **YARN,
            **WIDTHS,
            **ROOT,
            **LOCAL_EXPERTS,
            "expert_feed_forward_length": lambda config: config.intermediate_size,
            "attention.sliding_window": "sliding_window",
        },
        GATE_AND_UP_IN_TURN,
        present={"attention_bias": "attn_q.bias"},
    ),
    "lfm2": GgufArchitecture(
        "lfm2",
        {**_LFM2, "feed_forward_length": Setting("intermediate_size", _narrowed)},
        {"shortconv.conv.weight": WITHOUT_MIDDLE},
        frozenset(
            {"intermediate_size", "block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim"}
            | {"full_attn_idxs"}
        ),
        given={"block_auto_adjust_ff_dim": False},
        also=_blocks_of,
    ),
    "deepseek_v3": replace(
        _DEEPSEEK,
        settings={
            **_DEEPSEEK.settings,
            "expert_weights_norm": "norm_topk_prob",
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
            "expert_gating_func": lambda config: _SIGMOID,
        },
        given={"q_lora_rank": None, "norm_topk_prob": False},
        marks="exp_probs_b",
    ),
    "deepseek_v2": replace(_DEEPSEEK, settings={**_DEEPSEEK.settings, "expert_gating_func": lambda config: _SOFTMAX}),
}
