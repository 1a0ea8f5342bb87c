"""The content of GGUF files for architectures of 2024 and later, as ``gguf_families.py`` describes the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf_architectures import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf_changes import (
    BANK_HALVES,
    GATE_AND_UP_IN_TURN,
    LATENT,
    PAIRED,
    QWEN3_5,
    QWEN3_NEXT,
    ROW,
    WITHOUT_MIDDLE,
)
from knowledge_compression.models.checkpoints.gguf_settings import (
    COMMON,
    EXPERTS,
    LOCAL_BASE,
    LOCAL_EXPERTS,
    OWN_KEYS,
    PARTLY_ROTARY,
    ROOT,
    ROTARY,
    WIDTHS,
    WINDOWS,
    YARN,
    Setting,
    Settings,
    Told,
    head_width,
    only,
    rope,
    stretched_base,
    without,
)

SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers for how a router's scores become weights
_BIASES = {"attention_bias": "attn_q.bias"}
ROUTED: Settings = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "leading_dense_block_count": "first_k_dense_replace",
}


def _of_every_block(attribute: str) -> Callable[[Any], int]:
    """A number that a configuration may state for each block.

    Raises:
        BadInput: the blocks differ.
    """

    def store(config: Any) -> int:
        value = getattr(config, attribute)
        values = set(value) if isinstance(value, list) else {value}
        if len(values) > 1:
            raise BadInput(
                f"output.save_model=gguf: {config.model_type} has {attribute}={value}; llama.cpp takes one number for "
                "all blocks"
            )
        return int(values.pop())

    return store


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
_STRETCHED: Settings = {"rope.freq_base": Setting("rope_theta", stretched_base, lambda value, _: float(value))}
_SECTIONS: Settings = {"rope.dimension_sections": lambda config: [11, 11, 10, 0]}  # of text all positions are equal
SIGMOIDS: Settings = {
    **ROUTED,
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_gating_func": lambda config: SIGMOID,
    "expert_weights_norm": "norm_topk_prob",
}
_LFM2: Settings = {
    **without(COMMON, "feed_forward_length", "attention.head_count_kv"),
    **ROTARY,
    "attention.head_count_kv": _keys_of_blocks(),
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "shortconv.l_cache": "conv_L_cache",
}
LATENT_SIZES: Settings = {
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
}
DEEPSEEK = GgufArchitecture(
    "deepseek2",
    {
        **without(COMMON, "attention.head_count_kv"),
        **ROTARY,
        **YARN,
        **ROOT,
        **ROUTED,
        "attention.head_count_kv": lambda config: 1,  # a file's keys are latent vectors, which all heads share
        "attention.q_lora_rank": only(
            "q_lora_rank",
            lambda config: config.q_lora_rank is not None or config.num_hidden_layers in (26, 27),
            "in networks of 26 or 27 blocks",
        ),
        **LATENT_SIZES,
    },
    {**BANK_HALVES, **LATENT},
    given={"q_lora_rank": None},
    also=lambda told, _: {"num_key_value_heads": told["num_attention_heads"]},
)

NEWER: Mapping[str, GgufArchitecture] = {
    "exaone4": GgufArchitecture(
        "exaone4",
        {
            **COMMON,
            **ROTARY,
            **ROOT,
            "attention.key_length": only(
                "head_dim",
                lambda config: head_width(config) * config.num_attention_heads == config.hidden_size,
                "if all heads together are as wide as the network",
            ),
            "attention.value_length": lambda config: getattr(config, "head_dim", None),
            "attention.sliding_window": only(
                "sliding_window",
                lambda config: config.sliding_window is None or config.num_hidden_layers == 64,
                "in networks of 64 blocks",
            ),
        },
        given={"sliding_window": None},
        also=lambda told, _: (
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
        present=_BIASES,
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
        DEEPSEEK,
        settings={
            **DEEPSEEK.settings,
            "expert_weights_norm": "norm_topk_prob",
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
            "expert_gating_func": lambda config: SIGMOID,
        },
        given={"q_lora_rank": None, "norm_topk_prob": False},
        marks="exp_probs_b",
    ),
    "glm4_moe": GgufArchitecture(
        "glm4moe",
        {**COMMON, **WIDTHS, **PARTLY_ROTARY, **ROOT, **SIGMOIDS},
        BANK_HALVES,
        present={"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm"},
    ),
    "dots1": GgufArchitecture(
        "dots1",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            **SIGMOIDS,
            "attention.head_count_kv": OWN_KEYS,
        },
        BANK_HALVES,
        present=_BIASES,
    ),
    "ernie4_5_moe": GgufArchitecture(
        "ernie4_5-moe",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "moe_num_shared_experts",
            "expert_shared_feed_forward_length": lambda config: (
                config.moe_num_shared_experts * config.moe_intermediate_size
            ),
        },
        {**BANK_HALVES, "exp_probs_b": ROW},
        present={"use_bias": "attn_q.bias"},
    ),
    "minimax_m2": GgufArchitecture(
        "minimax-m2",
        {
            **COMMON,
            **WIDTHS,
            **PARTLY_ROTARY,
            **ROOT,
            **LOCAL_EXPERTS,
            "expert_feed_forward_length": lambda config: config.intermediate_size,
            "expert_gating_func": lambda config: SIGMOID,
        },
        BANK_HALVES,
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
    "hunyuan_v1_dense": GgufArchitecture(
        "hunyuan-dense",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            **_STRETCHED,
        },
        covers=frozenset({"rope_parameters"}),
        present=_BIASES,
    ),
    "hunyuan_v1_moe": GgufArchitecture(
        "hunyuan-moe",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            **_STRETCHED,
            "expert_count": "num_experts",
            "expert_used_count": Setting("moe_topk", _of_every_block("moe_topk")),
            "expert_shared_count": lambda config: 1,
            "expert_feed_forward_length": lambda config: config.intermediate_size,
            "expert_shared_feed_forward_length": lambda config: config.intermediate_size,
        },
        BANK_HALVES,
        covers=frozenset({"rope_parameters", "moe_topk"}),
        present=_BIASES,
    ),
    "olmo": GgufArchitecture(
        "olmo",
        {
            **COMMON,
            **ROTARY,
            "attention.layer_norm_epsilon": lambda config: 1e-5,
            "attention.clamp_kqv": "clip_qkv",
        },
        PAIRED,
    ),
    "olmo2": GgufArchitecture("olmo2", {**COMMON, **ROTARY, **ROOT}),
    "olmoe": GgufArchitecture(
        "olmoe",
        {
            **COMMON,
            **ROTARY,
            **ROOT,
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "attention.head_count_kv": OWN_KEYS,
        },
        BANK_HALVES,
    ),
    "olmo3": GgufArchitecture(
        "olmo2",
        {
            **COMMON,
            **ROTARY,
            **YARN,
            **ROOT,
            **LOCAL_BASE,
            **WINDOWS,
        },
        marks="attention.sliding_window",
    ),
    "ministral3": GgufArchitecture(
        "mistral3",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **YARN,
            **ROOT,
            "rope.scaling.yarn_log_multiplier": lambda config: rope(config).get("mscale_all_dim"),
            "attention.temperature_scale": lambda config: rope(config).get("llama_4_scaling_beta"),
        },
        PAIRED,
    ),
    "qwen3_next": GgufArchitecture("qwen3next", {**_LINEAR, **_SHARED}, QWEN3_NEXT, present=_BIASES),
    "qwen3_5_text": GgufArchitecture("qwen35", {**_LINEAR, **_SECTIONS}, QWEN3_5, present=_BIASES),
    "qwen3_5_moe_text": GgufArchitecture("qwen35moe", {**_LINEAR, **_SECTIONS, **_SHARED}, QWEN3_5, present=_BIASES),
    "deepseek_v2": replace(
        DEEPSEEK,
        settings={**DEEPSEEK.settings, "expert_gating_func": lambda config: SOFTMAX},
        covers=frozenset({"n_group", "topk_group"}),  # groups matter to no topk_method but one, which is refused
    ),
}
