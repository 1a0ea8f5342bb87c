"""The content of GGUF files of decoders before rotary embeddings were common, and of T5."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from knowledge_compression.models.checkpoints.gguf.architecture import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf.changes import of_each_group, of_each_kind
from knowledge_compression.models.checkpoints.gguf.settings import (
    COMMON,
    PARTLY_ROTARY,
    ROTARY,
    Setting,
    Settings,
    Told,
    inside,
)


def _falcon_keys(config: Any) -> int:
    """The number of key heads in Falcon's attention."""
    if config.new_decoder_architecture or not config.multi_query:
        return int(config.num_kv_heads)
    return 1


def _falcon_generation(told: Told, tensors: Collection[str]) -> Mapping[str, Any]:
    """Falcon's attention of 7B or of 40B, from the number of keys and norms."""
    keys, norms = told.get("num_kv_heads", 1), told["num_ln_in_parallel_attn"]
    new = norms == 2 or keys not in (1, told["num_attention_heads"])
    return {
        "new_decoder_architecture": new,
        "multi_query": keys == 1 or new,
        "num_ln_in_parallel_attn": norms if new else None,
    }


_MEAN: Settings = {"attention.layer_norm_epsilon": "layer_norm_eps"}
_T5 = GgufArchitecture(
    "t5",
    {
        "context_length": lambda config: getattr(config, "n_positions", None) or 512,
        "embedding_length": "d_model",
        "feed_forward_length": "d_ff",
        "block_count": "num_layers",
        "decoder_block_count": "num_decoder_layers",
        "attention.head_count": "num_heads",
        "attention.key_length": "d_kv",
        "attention.value_length": lambda config: config.d_kv,
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon": lambda config: config.layer_norm_epsilon,
        "attention.relative_buckets_count": "relative_attention_num_buckets",
        "decoder_start_token_id": "decoder_start_token_id",
        "vocab_size": "vocab_size",
    },
    covers=frozenset({"n_positions"}),
    present={
        "feed_forward_proj": ("ffn_gate", "gated-gelu", "relu"),
        "is_gated_act": "ffn_gate",
        "dense_act_fn": ("ffn_gate", "gelu_new", "relu"),
    },
)

OLDER: Mapping[str, GgufArchitecture] = {
    "gpt2": GgufArchitecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": lambda config: config.n_inner or 4 * config.n_embd,
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
        },
        covers=frozenset({"n_inner", "n_ctx"}),
    ),
    "gpt_bigcode": GgufArchitecture(
        "starcoder",
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": lambda config: config.n_inner or 4 * config.n_embd,
            "attention.head_count": "n_head",
            "attention.head_count_kv": lambda config: 1,
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
        },
        covers=frozenset({"n_inner"}),
    ),
    "gpt_neox": GgufArchitecture(
        "gptneox",
        {
            **{key: value for key, value in COMMON.items() if key != "attention.head_count_kv"},
            **PARTLY_ROTARY,
            **_MEAN,
            "use_parallel_residual": "use_parallel_residual",
        },
        {"attn_qkv": of_each_kind("num_attention_heads")},
        present={"attention_bias": "attn_qkv.bias"},
    ),
    "bloom": GgufArchitecture(
        "bloom",
        {
            "context_length": lambda config: getattr(config, "seq_length", None) or config.hidden_size,
            "embedding_length": "hidden_size",
            "block_count": "n_layer",
            "feed_forward_length": lambda config: 4 * config.hidden_size,
            "attention.head_count": "n_head",
            "attention.head_count_kv": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
        },
        {"attn_qkv": of_each_kind("n_head")},
        frozenset({"seq_length"}),
    ),
    "falcon": GgufArchitecture(
        "falcon",
        {
            "context_length": "max_position_embeddings",
            "tensor_data_layout": lambda config: "jploski",
            "embedding_length": "hidden_size",
            "block_count": "num_hidden_layers",
            "feed_forward_length": "ffn_hidden_size",
            "attention.head_count": "num_attention_heads",
            "attention.head_count_kv": Setting("num_kv_heads", _falcon_keys),
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
            "rope.freq_base": ROTARY["rope.freq_base"],
        },
        {"attn_qkv": of_each_group(_falcon_keys)},
        frozenset({"num_kv_heads"}),
        present={"num_ln_in_parallel_attn": ("attn_norm_2", 2, 1), "bias": "attn_qkv.bias"},
        also=_falcon_generation,
    ),
    "mpt": GgufArchitecture(
        "mpt",
        {
            "context_length": "max_seq_len",
            "embedding_length": "d_model",
            "block_count": "n_layers",
            "feed_forward_length": lambda config: config.expansion_ratio * config.d_model,
            "attention.head_count": "n_heads",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "attention.max_alibi_bias": inside("attn_config", "alibi_bias_max", float, int),
            "attention.clamp_kqv": inside("attn_config", "clip_qkv", float, float),
            "vocab_size": "vocab_size",
        },
    ),
    "t5": _T5,
    "umt5": replace(_T5, marks="enc.blk.1.attn_rel_b"),
}
