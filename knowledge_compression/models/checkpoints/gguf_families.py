"""The content of GGUF files for each architecture that is read and written here, by transformers' model type.

The keys are those of the GGUF specification that llama.cpp requires; the changes are those of its own conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from knowledge_compression.models.checkpoints.gguf_architectures import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf_changes import (
    BANK_HALVES,
    COLUMN,
    FLAT,
    NEGATIVE_EXPONENTIAL,
    NEGATIVE_EXPONENTIAL_COLUMN,
    PAIRED,
    PLUS_ONE,
    SHARED_HALVES,
    UNCHANGED,
    WITHOUT_MIDDLE,
    of_each_group,
    of_each_kind,
    row_per_group,
)
from knowledge_compression.models.checkpoints.gguf_further_families import FURTHER
from knowledge_compression.models.checkpoints.gguf_further_hybrids import FURTHER_HYBRID
from knowledge_compression.models.checkpoints.gguf_gemma_families import GEMMAS
from knowledge_compression.models.checkpoints.gguf_hybrid_families import HYBRID
from knowledge_compression.models.checkpoints.gguf_latest_families import LATEST
from knowledge_compression.models.checkpoints.gguf_newer_families import NEWER
from knowledge_compression.models.checkpoints.gguf_settings import (
    COMMON,
    EXPERTS,
    LOCAL_EXPERTS,
    PARTLY_ROTARY,
    ROOT,
    ROTARY,
    SCALES,
    WIDTHS,
    Setting,
    Settings,
    falcon_generation,
    falcon_keys,
    inside,
    only,
)

_MEAN: Settings = {"attention.layer_norm_epsilon": "layer_norm_eps"}
_UNSCALED: Settings = {"rope.scaling.type": lambda config: "none"}
_NORMS = {"norm.weight": PLUS_ONE}
_BIASES = {"attention_bias": "attn_q.bias"}


def _norms_of_64_blocks(config: Any) -> None:
    """Nothing is written: llama.cpp takes norms of queries and keys for granted from 64 blocks on."""
    only("use_qk_norm", lambda one: not one.use_qk_norm or one.num_hidden_layers >= 64, "from 64 blocks on").stored(
        config
    )


_MAMBAS: Settings = {
    "context_length": lambda config: 1 << 20,  # the network has no limit, but llama.cpp requires one
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": lambda config: 0,
    "attention.head_count": lambda config: 0,
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
}
_LLAMA = GgufArchitecture("llama", {**COMMON, **ROTARY, **WIDTHS, **ROOT}, PAIRED)
_GRANITE = GgufArchitecture("granite", {**COMMON, **ROTARY, **ROOT, **SCALES}, PAIRED, present=_BIASES)

_LLAMAS = {
    "llama": replace(_LLAMA, present={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}),
    "mistral": _LLAMA,
    **dict.fromkeys(
        ("internlm3", "iquestcoder"),  # networks of the class LlamaForCausalLM, as which they are read
        replace(_LLAMA, present={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}),
    ),
    "mixtral": replace(
        _LLAMA, settings={**_LLAMA.settings, **LOCAL_EXPERTS}, changes={**PAIRED, **BANK_HALVES}, marks="ffn_gate_inp"
    ),
    "arcee": replace(_LLAMA, name="arcee", present={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}),
    "smollm3": GgufArchitecture(
        "smollm3",
        {**COMMON, **ROTARY, **ROOT},
        PAIRED,
        present={"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"},
    ),
    "granite": replace(_GRANITE, present={**_BIASES, "mlp_bias": "ffn_up.bias"}),
    "granitemoe": replace(
        _GRANITE,
        name="granitemoe",
        settings={**_GRANITE.settings, **LOCAL_EXPERTS},
        changes={**PAIRED, **BANK_HALVES},
    ),
    "granitemoeshared": replace(
        _GRANITE,
        name="granitemoe",
        settings={
            **_GRANITE.settings,
            **LOCAL_EXPERTS,
            "expert_shared_feed_forward_length": "shared_intermediate_size",
        },
        changes={**PAIRED, **BANK_HALVES, **SHARED_HALVES},
        marks="ffn_gate_shexp",
    ),
    "seed_oss": GgufArchitecture(
        "seed_oss",
        {**COMMON, **ROTARY, **WIDTHS, **ROOT},
        present={**_BIASES, "attention_out_bias": "attn_output.bias", "mlp_bias": "ffn_up.bias"},
    ),
    "ernie4_5": GgufArchitecture(
        "ernie4_5", {**COMMON, **ROTARY, **WIDTHS, **ROOT}, present={"use_bias": "attn_q.bias"}
    ),
    "glm4": GgufArchitecture("glm4", {**COMMON, **WIDTHS, **PARTLY_ROTARY, **ROOT}, present=_BIASES),
    "phi": GgufArchitecture("phi2", {**COMMON, **PARTLY_ROTARY, **_MEAN}, present={"qk_layernorm": "attn_q_norm"}),
    "phi3": GgufArchitecture(
        "phi3",
        {
            **COMMON,
            **PARTLY_ROTARY,
            **ROOT,
            "attention.sliding_window": Setting("sliding_window", None, lambda value, _: value or None),
            "rope.scaling.original_context_length": "original_max_position_embeddings",
        },
    ),
    "stablelm": GgufArchitecture(
        "stablelm",
        {**COMMON, **PARTLY_ROTARY, **_MEAN, "use_parallel_residual": "use_parallel_residual"},
        present={"use_qkv_bias": "attn_q.bias", "qk_layernorm": "attn_q_norm"},
    ),
    "starcoder2": GgufArchitecture(
        "starcoder2",
        {**COMMON, **ROTARY, "attention.layer_norm_epsilon": "norm_epsilon"},
        present={"use_bias": "attn_q.bias"},
    ),
    "nemotron": GgufArchitecture(
        "nemotron",
        {
            **COMMON,
            **WIDTHS,
            **PARTLY_ROTARY,
            **_UNSCALED,
            "attention.layer_norm_epsilon": "norm_eps",
            "attention.layer_norm_rms_epsilon": lambda config: config.norm_eps,
        },
        _NORMS,
        present={**_BIASES, "mlp_bias": "ffn_up.bias"},
    ),
}

_QWENS = {
    "qwen2": GgufArchitecture("qwen2", {**COMMON, **ROTARY, **ROOT}),
    "qwen3": GgufArchitecture("qwen3", {**COMMON, **ROTARY, **WIDTHS, **ROOT}, present=_BIASES),
    "qwen2_moe": GgufArchitecture(
        "qwen2moe",
        {
            **COMMON,
            **ROTARY,
            **ROOT,
            **EXPERTS,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        {**BANK_HALVES, "ffn_gate_inp_shexp": FLAT},
        present={"qkv_bias": "attn_q.bias"},
    ),
    "qwen3_moe": GgufArchitecture(
        "qwen3moe",
        {**COMMON, **ROTARY, **WIDTHS, **ROOT, **EXPERTS},
        BANK_HALVES,
        given={"norm_topk_prob": True},
        present=_BIASES,
    ),
}

_COHERES = {
    "cohere": GgufArchitecture(
        "command-r",
        {**COMMON, **ROTARY, **_UNSCALED, **_MEAN, "logit_scale": "logit_scale", "norms": _norms_of_64_blocks},
        present={**_BIASES, "use_qk_norm": "attn_q_norm"},
    ),
    "cohere2": GgufArchitecture(
        "cohere2",
        {
            **COMMON,
            **ROTARY,
            **WIDTHS,
            **_UNSCALED,
            **_MEAN,
            "logit_scale": "logit_scale",
            "attention.sliding_window": "sliding_window",
        },
    ),
}

_OLDER = {
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
            "attention.head_count_kv": Setting("num_kv_heads", falcon_keys),
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
            "rope.freq_base": ROTARY["rope.freq_base"],
        },
        {"attn_qkv": of_each_group(falcon_keys)},
        frozenset({"num_kv_heads"}),
        present={"num_ln_in_parallel_attn": ("attn_norm_2", 2, 1), "bias": "attn_qkv.bias"},
        also=falcon_generation,
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
    "mamba": GgufArchitecture(
        "mamba",
        {
            **_MAMBAS,
            "ssm.inner_size": "intermediate_size",
            "ssm.state_size": "state_size",
            "ssm.time_step_rank": "time_step_rank",
            "ssm.dt_b_c_rms": lambda config: False,
            "vocab_size": "vocab_size",
        },
        {"ssm_a": NEGATIVE_EXPONENTIAL, "ssm_conv1d.weight": WITHOUT_MIDDLE},
        frozenset({"expand", "max_position_embeddings", "time_step_min"}),
    ),
    "mamba2": GgufArchitecture(
        "mamba2",
        {
            **_MAMBAS,
            "ssm.state_size": "state_size",
            "ssm.time_step_rank": "num_heads",
            "ssm.inner_size": Setting(
                "head_dim",
                lambda config: config.num_heads * config.head_dim,
                lambda value, told: value // told["num_heads"],
            ),
            "ssm.group_count": "n_groups",
            "vocab_size": "vocab_size",
        },
        {
            "ssm_a": NEGATIVE_EXPONENTIAL_COLUMN,
            "ssm_dt": UNCHANGED,  # before ssm_d, which its name contains
            "ssm_d": COLUMN,
            "ssm_conv1d.weight": WITHOUT_MIDDLE,
            "ssm_norm": row_per_group("n_groups"),
        },
        frozenset({"time_step_rank", "chunk_size", "time_step_min"}),
        also=lambda told, _: {"expand": told["num_heads"] * told["head_dim"] // told["hidden_size"]},
    ),
}


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
_ENCODER_DECODERS = {"t5": _T5, "umt5": replace(_T5, marks="enc.blk.1.attn_rel_b")}

ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    **_LLAMAS,
    **_QWENS,
    **_COHERES,
    **GEMMAS,
    **_OLDER,
    **_ENCODER_DECODERS,
    **NEWER,
    **LATEST,
    **HYBRID,
    **FURTHER_HYBRID,
    **FURTHER,
}
