"""The content of GGUF files of networks with linear attention or convolutions in some blocks: Qwen's and LFM2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from knowledge_compression.models.checkpoints.gguf.architecture import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf.changes import BANK_HALVES, QWEN3_5, QWEN3_NEXT, WITHOUT_MIDDLE
from knowledge_compression.models.checkpoints.gguf.settings import (
    BIASES,
    COMMON,
    EXPERTS,
    PARTLY_ROTARY,
    ROOT,
    ROTARY,
    SIGMOID,
    WIDTHS,
    Setting,
    Settings,
    Told,
    without,
)


def _keys_of_blocks() -> Setting:
    """The number of key heads of each block, 0 in blocks of convolutions."""

    def store(config: Any) -> list[int]:
        return [0 if one == "conv" else config.num_key_value_heads for one in config.layer_types]

    def load(value: Any, told: Told) -> list[int]:
        return list(value)

    return Setting("num_key_value_heads", store, load)


def _blocks_of(keys: Told, tensors: Collection[str]) -> Mapping[str, Any]:
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


_LINEAR: Settings = {
    **COMMON,
    **WIDTHS,
    **PARTLY_ROTARY,
    **ROOT,
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.inner_size": Setting(
        "linear_value_head_dim",
        lambda config: config.linear_value_head_dim * config.linear_num_value_heads,
        lambda value, told: value // told["linear_num_value_heads"],
    ),
    "attention.recurrent_layers": Setting(
        "layer_types",
        lambda config: [kind == "linear_attention" for kind in config.layer_types],
        lambda value, told: ["linear_attention" if one else "full_attention" for one in value],
    ),
    "full_attention_interval": lambda config: 4,
}
_SHARED: Settings = {**EXPERTS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_SECTIONS: Settings = {"rope.dimension_sections": lambda config: [11, 11, 10, 0]}  # of text all positions are equal
_LFM2: Settings = {
    **without(COMMON, "feed_forward_length", "attention.head_count_kv"),
    **ROTARY,
    "attention.head_count_kv": _keys_of_blocks(),
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "shortconv.l_cache": "conv_L_cache",
}

LINEAR_ATTENTION: Mapping[str, GgufArchitecture] = {
    "qwen3_next": GgufArchitecture("qwen3next", {**_LINEAR, **_SHARED}, QWEN3_NEXT, present=BIASES),
    "qwen3_5_text": GgufArchitecture("qwen35", {**_LINEAR, **_SECTIONS}, QWEN3_5, present=BIASES),
    "qwen3_5_moe_text": GgufArchitecture("qwen35moe", {**_LINEAR, **_SECTIONS, **_SHARED}, QWEN3_5, present=BIASES),
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
    "lfm2_moe": GgufArchitecture(
        "lfm2moe",
        {
            **_LFM2,
            **EXPERTS,
            "feed_forward_length": "intermediate_size",
            "leading_dense_block_count": "num_dense_layers",
            "expert_gating_func": lambda config: SIGMOID,
        },
        {"shortconv.conv.weight": WITHOUT_MIDDLE, **BANK_HALVES},
        present={"use_expert_bias": "exp_probs_b"},
        also=_blocks_of,
    ),
}
