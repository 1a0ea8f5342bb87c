"""The content of GGUF files for further architectures, as ``gguf_families.py`` describes the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf_architectures import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf_changes import BANK_HALVES, LATENT, Array, Change
from knowledge_compression.models.checkpoints.gguf_latest_families import leading_dense
from knowledge_compression.models.checkpoints.gguf_newer_families import LATENT_SIZES, NEWER, SIGMOID
from knowledge_compression.models.checkpoints.gguf_settings import (
    COMMON,
    OWN_KEYS,
    ROOT,
    ROTARY,
    WINDOWS,
    Setting,
    Settings,
    Told,
    inside,
    only,
    rope,
    without,
)


def _base_of_dbrx(config: Any) -> float:
    """The base of DBRX's rotary embeddings, which its configuration states twice.

    Raises:
        BadInput: it states two; transformers computes with one, its authors' code and llama.cpp with the other.
    """
    base, stated = rope(config)["rope_theta"], config.attn_config.rope_theta
    if base != stated:
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} has attn_config.rope_theta={stated}, but transformers "
            f"computes with rope_parameters.rope_theta={base}; a GGUF file has one"
        )
    return float(base)


def _bank(*, turned: bool) -> Change:
    """All experts' rows below each other in the network, a bank of matrices in the file."""

    def store(tensor: Array, config: Any) -> Array:
        bank = tensor.reshape(config.ffn_config.moe_num_experts, -1, tensor.shape[-1])
        return bank.swapaxes(1, 2) if turned else bank

    def load(tensor: Array, config: Any) -> Array:
        bank = tensor.swapaxes(1, 2) if turned else tensor
        return bank.reshape(-1, bank.shape[-1])

    return Change(store, load, rows=not turned)


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
_V3 = NEWER["deepseek_v3"]
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


def _bases(kind: str) -> Setting:
    """The base of the rotary embeddings of blocks with one kind of attention.

    Raises:
        BadInput: they are scaled.
    """

    def store(config: Any) -> float | None:
        if (told := config.rope_parameters.get(kind)) is None:
            return None
        if (scaled := told.get("rope_type", "default")) != "default":
            raise BadInput(
                f"output.save_model=gguf writes rotary embeddings of the type default, but those of {kind} of this "
                f"{config.model_type} have {scaled}"
            )
        return float(told["rope_theta"])

    def load(value: Any, told: Told) -> Any:
        there = told.get("rope_parameters", {})
        return there | {kind: {"rope_type": "default", "rope_theta": float(value)}}

    return Setting("rope_parameters", store, load)


def _rotated_in_both(config: Any) -> int:
    """The number of rotated channels of a head.

    Raises:
        BadInput: it differs between the two kinds of attention.
    """
    shares = [told.get("partial_rotary_factor", 0.334) for told in config.rope_parameters.values()]
    counts = {int(config.head_dim * share) for share in shares}
    if len(counts) > 1:
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} rotates {sorted(counts)} channels of its heads in different "
            "blocks; a GGUF file has one number"
        )
    return counts.pop()


def _with_share(value: Any, told: Told) -> Any:
    share = {"partial_rotary_factor": (value + 0.5) / told["head_dim"]}  # the network rounds the number down
    return {kind: parameters | share for kind, parameters in told["rope_parameters"].items()}


def _keys_of_windows(config: Any) -> list[int]:
    """The number of key heads of each block: twice as many where the attention has a window."""
    return [config.num_key_value_heads * (1 + (kind == "sliding_attention")) for kind in config.layer_types]


def _keys(value: Any, told: Told) -> int:
    return min(
        count // (1 + (kind == "sliding_attention")) for count, kind in zip(value, told["layer_types"], strict=True)
    )


def _feed_forward(told: Told, tensors: Collection[str]) -> Mapping[str, Any]:
    routed = [f"blk.{block}.ffn_gate_inp.weight" in tensors for block in range(told["num_hidden_layers"])]
    return {"mlp_layer_types": ["sparse" if one else "dense" for one in routed]}


FURTHER: Mapping[str, GgufArchitecture] = {
    "dbrx": GgufArchitecture(
        "dbrx",
        {
            "context_length": "max_seq_len",
            "embedding_length": "d_model",
            "block_count": "n_layers",
            "attention.head_count": "n_heads",
            "attention.head_count_kv": inside("attn_config", "kv_n_heads", int, int),
            "attention.clamp_kqv": Setting(
                "attn_config",
                lambda config: float(config.attn_config.clip_qkv or 0),  # llama.cpp requires it; 0 is none
                lambda value, told: told["attn_config"] | {"clip_qkv": float(value) or None},
            ),
            "rope.freq_base": Setting("rope_theta", _base_of_dbrx, lambda value, _: float(value)),
            "rope.dimension_count": ROTARY["rope.dimension_count"],
            "feed_forward_length": inside("ffn_config", "ffn_hidden_size", int, int),
            "expert_count": inside("ffn_config", "moe_num_experts", int, int),
            "expert_used_count": inside("ffn_config", "moe_top_k", int, int),
            "attention.layer_norm_epsilon": lambda config: 1e-5,
            "vocab_size": "vocab_size",
        },
        {"ffn_gate_exps": _bank(turned=False), "ffn_up_exps": _bank(turned=False), "ffn_down_exps": _bank(turned=True)},
        also=lambda told, _: {"attn_config": told["attn_config"] | {"rope_theta": told["rope_theta"]}},
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
    "mimo_v2_flash": GgufArchitecture(
        "mimo2",
        {
            **without(COMMON, "attention.head_count_kv"),
            **ROOT,
            **WINDOWS,
            "attention.head_count_kv": Setting("num_key_value_heads", _keys_of_windows, _keys),
            "attention.key_length": "head_dim",
            "attention.value_length": "v_head_dim",
            "attention.value_scale": "attention_value_scale",
            "rope.freq_base": _bases("full_attention"),
            "rope.freq_base_swa": _bases("sliding_attention"),
            "rope.dimension_count": Setting("rope_parameters", _rotated_in_both, _with_share),
            "expert_count": "n_routed_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
            "expert_gating_func": lambda config: SIGMOID,
        },
        BANK_HALVES,
        covers=frozenset({"rope_parameters", "attention_chunk_size"}),  # no block has chunks
        given={"attention_value_scale": None},
        also=_feed_forward,
    ),
}
