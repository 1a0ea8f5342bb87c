"""The content of GGUF files of networks with latent attention: DeepSeek and those built like it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf.architecture import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf.changes import BANK_HALVES, LATENT, Array, Change
from knowledge_compression.models.checkpoints.gguf.settings import (
    COMMON,
    OWN_KEYS,
    ROOT,
    ROTARY,
    ROUTED,
    SIGMOID,
    SOFTMAX,
    YARN,
    Setting,
    Settings,
    leading_dense,
    only,
    without,
)


def _in_pairs(config: Any) -> None:
    """Nothing is written: neighbouring channels are rotated together.

    Raises:
        BadInput: the two halves of a head are.
    """
    if not config.rope_interleave:
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} has rope_interleave=False, which a GGUF file cannot express"
        )


def _third(number: int) -> Change:
    """The convolution of queries (0), keys (1) or values (2), which is one in the network."""

    def store(tensor: Array, config: Any) -> Array:
        return np.split(tensor, 3)[number]

    return Change(store, lambda tensor, _: tensor, join=np.concatenate)


_NEGATIVE_EXPONENTIAL = Change(
    lambda tensor, _: -np.exp(tensor), lambda tensor, _: np.log(-tensor).reshape(1, 1, -1, 1)
)
_DENSE = Setting(
    "mlp_layer_types",
    leading_dense,
    lambda value, told: ["dense"] * value + ["sparse"] * (told["num_hidden_layers"] - value),
)
_INDEXED: Settings = {
    "attention.indexer.head_count": "index_n_heads",
    "attention.indexer.key_length": only(  # by a Hadamard matrix of this size
        "index_head_dim", lambda config: config.index_head_dim in (64, 128, 256), "if it is 64, 128 or 256"
    ),
    "attention.indexer.top_k": "index_topk",
    "attention.indexer.types": Setting(
        "indexer_types",
        lambda config: [kind == "full" for kind in config.indexer_types],
        lambda value, _: ["full" if one else "shared" for one in value],
    ),
}


def _linear_heads(config: Any) -> None:
    """Nothing is written: linear attention has as many heads as the other.

    Raises:
        BadInput: it has not.
    """
    if config.linear_num_heads != config.num_attention_heads:
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} has linear_num_heads={config.linear_num_heads}; llama.cpp "
            f"takes only the number of the other heads, {config.num_attention_heads}"
        )


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
_V3 = replace(
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
)

LATENT_ATTENTION: Mapping[str, GgufArchitecture] = {
    "deepseek_v3": _V3,
    "deepseek_v2": replace(
        DEEPSEEK,
        settings={**DEEPSEEK.settings, "expert_gating_func": lambda config: SOFTMAX},
        covers=frozenset({"n_group", "topk_group"}),  # groups matter to no topk_method but one, which is refused
    ),
    # Written as types with the same answers, as which they are read.
    "glm4_moe_lite": replace(
        _V3,
        settings={**_V3.settings, "leading_dense_block_count": leading_dense},
        covers=_V3.covers | {"mlp_layer_types"},
    ),
    "youtu": replace(
        DEEPSEEK,
        settings={
            **without(DEEPSEEK.settings, *ROUTED),
            "leading_dense_block_count": lambda config: config.num_hidden_layers,
            "expert_feed_forward_length": lambda config: config.intermediate_size,
            "expert_shared_count": lambda config: 0,
            "pairs": _in_pairs,
        },
        covers=frozenset({"embedding_initializer_range", "rope_interleave"}),
    ),
    "minicpm3": GgufArchitecture(
        "minicpm3",
        {
            **COMMON,
            **ROOT,
            "rope.freq_base": ROTARY["rope.freq_base"],
            "rope.dimension_count": "qk_rope_head_dim",
            "attention.q_lora_rank": "q_lora_rank",
            "attention.kv_lora_rank": "kv_lora_rank",
            "attention.key_length": Setting(
                "qk_nope_head_dim",
                lambda config: config.qk_nope_head_dim + config.qk_rope_head_dim,
                lambda value, told: value - told["qk_rope_head_dim"],
            ),
            "attention.value_length": "v_head_dim",
            "attention.head_count_kv": OWN_KEYS,
        },
        further={r".*layers\.(\d+)\.self_attn\.kv_b_proj\.weight": ("blk.{}.attn_kv_b.weight",)},
    ),
    "glm_moe_dsa": replace(
        _V3,
        name="glm-dsa",
        settings={
            **_V3.settings,
            **_INDEXED,
            "attention.q_lora_rank": "q_lora_rank",
            "leading_dense_block_count": _DENSE,
        },
        covers=_V3.covers | {"first_k_dense_replace"},  # the network reads mlp_layer_types
        marks="",
    ),
    "kimi_linear": GgufArchitecture(
        "kimi-linear",
        {
            **without(COMMON, "context_length", "attention.head_count_kv"),
            **ROOT,
            "context_length": "model_max_length",
            "heads": _linear_heads,
            "attention.head_count_kv": Setting(
                "layer_types",
                lambda config: [int(kind == "full_attention") for kind in config.layer_types],
                lambda value, _: ["full_attention" if one else "linear_attention" for one in value],
            ),
            "ssm.conv_kernel": "linear_conv_kernel_dim",
            "kda.head_dim": "linear_head_dim",
            **LATENT_SIZES,
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_token",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "num_shared_experts",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_group_count": "num_expert_group",
            "expert_group_used_count": "topk_group",
            "expert_gating_func": lambda config: SIGMOID,
            "leading_dense_block_count": _DENSE,
        },
        {
            **BANK_HALVES,
            **LATENT,
            "ssm_a": _NEGATIVE_EXPONENTIAL,
            **{f"ssm_conv1d_{name}": _third(number) for number, name in enumerate("qkv")},
        },
        also=lambda told, _: dict.fromkeys(("num_key_value_heads", "linear_num_heads"), told["num_attention_heads"]),
        further={
            r".*layers\.(\d+)\.self_attn\.conv1d\.weight": tuple(f"blk.{{}}.ssm_conv1d_{one}.weight" for one in "qkv"),
            r".*layers\.(\d+)\.self_attn\.forget_gate\.dt_bias": ("blk.{}.ssm_dt.bias",),
            r".*layers\.(\d+)\.self_attn\.forget_gate\.A_log": ("blk.{}.ssm_a",),
            r".*layers\.(\d+)\.self_attn\.forget_gate\.f_a_proj\.weight": ("blk.{}.ssm_f_a.weight",),
            r".*layers\.(\d+)\.self_attn\.forget_gate\.f_b_proj\.weight": ("blk.{}.ssm_f_b.weight",),
        },
    ),
}
