"""The content of GGUF files for architectures of 2025, as ``gguf_families.py`` describes the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf_architectures import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf_changes import BANK_HALVES
from knowledge_compression.models.checkpoints.gguf_newer_families import DEEPSEEK, NEWER, ROUTED, SIGMOID, SIGMOIDS
from knowledge_compression.models.checkpoints.gguf_settings import (
    COMMON,
    EXPERTS,
    LOCAL_EXPERTS,
    PARTLY_ROTARY,
    ROOT,
    ROTARY,
    WIDTHS,
    WINDOWS,
    Setting,
    Settings,
    head_width,
    without,
)

_BIASES = {"attention_bias": "attn_q.bias"}
_UNNORMALISED = 128  # the number of experts from which llama.cpp recognises a Llama 4 without norms of queries and keys


def leading_dense(config: Any) -> int:
    """The number of blocks before the first with experts.

    Raises:
        BadInput: a later block has none.
    """
    kinds = list(config.mlp_layer_types)
    count = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if "dense" in kinds[count:]:
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} has mlp_layer_types={kinds}; llama.cpp takes blocks without "
            "experts only before those with experts"
        )
    return count


def _as_wide_as_network(config: Any) -> None:
    """Nothing is written: all heads together are as wide as the network.

    Raises:
        BadInput: they are not.
    """
    if (width := head_width(config) * config.num_attention_heads) != config.hidden_size:
        raise BadInput(
            f"output.save_model=gguf: the heads of this {config.model_type} are {width} wide together; llama.cpp takes "
            f"only the width of the network, {config.hidden_size}"
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


_OF_WIDTH: Settings = {"heads": _as_wide_as_network}
_V3 = NEWER["deepseek_v3"]

LATEST: Mapping[str, GgufArchitecture] = {
    "llama4_text": GgufArchitecture(
        "llama4",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            **LOCAL_EXPERTS,
            "feed_forward_length": "intermediate_size_mlp",
            "expert_feed_forward_length": "intermediate_size",
            "interleave_moe_layer_step": "interleave_moe_layer_step",
        },
        BANK_HALVES,
        also=lambda told, _: {"use_qk_norm": told.get("num_local_experts") != _UNNORMALISED},
    ),
    "apertus": GgufArchitecture(
        "apertus",
        {**COMMON, **WIDTHS, **ROTARY, **ROOT},
        present=_BIASES,
        numbers={f"xielu.{name}": f".mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")},
    ),
    "afmoe": GgufArchitecture(
        "afmoe",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            **EXPERTS,
            "expert_shared_count": "num_shared_experts",
            "leading_dense_block_count": "num_dense_layers",
            "expert_weights_norm": lambda config: True,
            "expert_weights_scale": "route_scale",
            "expert_gating_func": lambda config: SIGMOID,
            "attention.sliding_window": "sliding_window",
        },
        BANK_HALVES,
        covers=frozenset({"global_attn_every_n_layers"}),
        given={"mup_enabled": True},
        present=_BIASES,
    ),
    "exaone_moe": GgufArchitecture(
        "exaone-moe",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            **EXPERTS,
            **WINDOWS,
            "expert_shared_count": "num_shared_experts",
            "expert_shared_feed_forward_length": lambda config: (
                config.num_shared_experts * config.moe_intermediate_size
            ),
            "expert_weights_norm": "norm_topk_prob",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
            "expert_gating_func": lambda config: SIGMOID,
            "leading_dense_block_count": Setting("first_k_dense_replace", leading_dense),
            "nextn_predict_layers": lambda config: 0,
            "rope.scaling.type": lambda config: "none",
        },
        BANK_HALVES,
        covers=frozenset({"sliding_window_pattern", "mlp_layer_types", "first_k_dense_replace"}),
    ),
    "jais2": GgufArchitecture(
        "jais2", {**COMMON, **WIDTHS, **ROTARY, "attention.layer_norm_epsilon": "layer_norm_eps"}
    ),
    "glm": GgufArchitecture(
        "chatglm",
        {**COMMON, **PARTLY_ROTARY, **ROOT, **_OF_WIDTH},
        present=_BIASES,
        also=lambda told, _: {"head_dim": told["hidden_size"] // told["num_attention_heads"]},
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
    "solar_open": replace(
        NEWER["glm4_moe"],
        settings={**COMMON, **WIDTHS, **PARTLY_ROTARY, **ROOT, **SIGMOIDS}
        | {"leading_dense_block_count": lambda config: 0},
    ),
}
