"""Tiny networks of every architecture that is written as GGUF, with a tokenizer that GGUF describes."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast, T5Tokenizer

from helpers.gguf_files import ARCHITECTURES, HEADS, MERGES, TINY, TOKENS
from knowledge_compression.models import Model
from knowledge_compression.models.checkpoints.gguf.architecture import GgufArchitecture, architecture_for
from knowledge_compression.models.checkpoints.gguf.settings import Setting
from knowledge_compression.models.pretrained import auto_class

# What readers of files take for granted of an architecture, where a tiny network of transformers differs.
GRANTED: dict[str, dict[str, Any]] = {
    "qwen3moe": {"norm_topk_prob": True},
    "gemma2": {"head_dim": 256},
    "gemma3": {"head_dim": 256},
    "mistral": {"sliding_window": None},
    "phi3": {"original_max_position_embeddings": 64, "sliding_window": 32},  # llama.cpp leaves the window out
}
_WORDS = {"vocab_size": len(TOKENS)}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64} | _WORDS
_SCALES = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4} | _WORDS
_T5 |= {"decoder_start_token_id": 0}
# Beside those of gguf_files.py: networks by GGUF's name for them and, where several share one, a word more.
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", TINY | HEADS),
    "llama with biases": ("llama", TINY | HEADS | {"attention_bias": True, "mlp_bias": True}),
    "mixtral": ("mixtral", TINY | HEADS | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2moe with widths": (
        "qwen2_moe",
        TINY
        | {"num_experts": 3, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
        | {"shared_expert_intermediate_size": 48},
    ),
    "qwen3 with widths": ("qwen3", TINY | HEADS),
    "starcoder2 with another base": (
        "starcoder2",
        TINY | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "arcee": ("arcee", TINY | HEADS),
    "smollm3": ("smollm3", TINY | {"num_hidden_layers": 4, "pad_token_id": 0}),
    "granite": ("granite", TINY | _SCALES),
    "granitemoe": ("granitemoe", TINY | _SCALES | {"num_local_experts": 3}),
    "granitemoe shared": (
        "granitemoeshared",
        TINY | _SCALES | {"num_local_experts": 3, "shared_intermediate_size": 48},
    ),
    "seed_oss": ("seed_oss", TINY | HEADS),
    "ernie4_5": ("ernie4_5", TINY | HEADS),
    "glm4": ("glm4", TINY | HEADS | {"pad_token_id": 0}),
    "phi2": ("phi", TINY),
    "stablelm with a share": ("stablelm", TINY | {"use_qkv_bias": True}),
    "olmo": ("olmo", TINY | {"clip_qkv": 2.0}),
    "olmo2": ("olmo2", TINY),
    "olmoe": ("olmoe", TINY | {"num_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "command-r": ("cohere", TINY),
    "cohere2": ("cohere2", TINY | HEADS | {"sliding_window": 4, "num_hidden_layers": 4}),
    "gemma": ("gemma", TINY | HEADS),
    "starcoder": ("gpt_bigcode", _GPT),
    "gptneox": ("gpt_neox", {k: v for k, v in TINY.items() if k != "num_key_value_heads"}),
    "falcon 40b": (
        "falcon",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
        | {"new_decoder_architecture": True}
        | _WORDS,
    ),
    "mpt": ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64} | _WORDS),
    "mamba2": (
        "mamba2",
        {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 16}
        | {"n_groups": 2, "conv_kernel": 4, "chunk_size": 8}
        | _WORDS,
    ),
    "t5": ("t5", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5 of relu": ("t5", _T5 | {"feed_forward_proj": "relu", "num_decoder_layers": 3}),
    "umt5": ("umt5", _T5 | {"feed_forward_proj": "gated-gelu"}),
}
_LATENT = {"kv_lora_rank": 32, "q_lora_rank": 64, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 16}
_LATENT |= {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
_LATENT |= {"moe_intermediate_size": 32, "n_shared_experts": 2, "routed_scaling_factor": 1.5}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 2}
_ROUTED |= {"routed_scaling_factor": 1.5, "first_k_dense_replace": 1}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16}
_LINEAR |= {"linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6}
_EXPERTS_OF_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXPERTS_OF_QWEN |= {"shared_expert_intermediate_size": 48}
_WIDE = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8}
_WIDE |= {"beta_fast": 32.0, "beta_slow": 1.0}
_NARROW = {"rope_type": "default", "rope_theta": 5e5}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 32}
_YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707}
_TWO_KINDS = {"layer_types": ["conv", "full_attention"], "pad_token_id": 0}
FURTHER |= {
    "exaone4": ("exaone4", TINY | {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "gpt-oss": ("gpt_oss", TINY | HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "lfm2": ("lfm2", TINY | _TWO_KINDS | {"block_multiple_of": 8}),
    "glm4moe": (
        "glm4_moe",
        TINY | HEADS | _ROUTED | {"use_qk_norm": True, "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 0},
    ),
    "dots1": ("dots1", TINY | HEADS | _ROUTED | {"n_group": 2, "topk_group": 1, "num_key_value_heads": 4}),
    "ernie4_5-moe": (
        "ernie4_5_moe",
        TINY | HEADS | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "pad_token_id": 0},
    ),
    "minimax-m2": (
        "minimax_m2",
        TINY | HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    ),
    "lfm2moe": (
        "lfm2_moe",
        TINY
        | _TWO_KINDS
        | {"num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 32},
    ),
    "hunyuan-dense": ("hunyuan_v1_dense", TINY | HEADS | {"pad_token_id": 0}),
    "hunyuan-dense stretched": (
        "hunyuan_v1_dense",
        TINY
        | HEADS
        | {"pad_token_id": 0}
        | {"rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4}},
    ),
    "hunyuan-moe": ("hunyuan_v1_moe", TINY | HEADS | {"pad_token_id": 0, "num_experts": 4, "moe_topk": [2, 2]}),
    "olmo2 with windows": (
        "olmo3",
        TINY
        | {"sliding_window": 4, "num_hidden_layers": 4}
        | {
            "rope_parameters": {
                "full_attention": _WIDE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            }
        },
    ),
    "mistral3": (
        "ministral3",
        TINY | HEADS | {"rope_parameters": _WIDE | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    ),
    "qwen3next": ("qwen3_next", TINY | HEADS | _LINEAR | _EXPERTS_OF_QWEN),
    "qwen35": ("qwen3_5_text", TINY | _LINEAR | {"head_dim": 256}),
    "qwen35moe": ("qwen3_5_moe_text", TINY | {"head_dim": 256} | _LINEAR | _EXPERTS_OF_QWEN),
    "deepseek2": ("deepseek_v3", TINY | _LATENT | {"n_group": 2, "topk_group": 1}),
    "deepseek2 yarn": ("deepseek_v3", TINY | _LATENT | {"n_group": 2, "topk_group": 1, "rope_parameters": _YARN}),
    "deepseek2 without groups": ("deepseek_v2", TINY | _LATENT | {"rope_parameters": _YARN}),
}
_STATES = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8}
_HYBRID = TINY | _SCALES | _STATES | {"shared_intermediate_size": 48, "layer_types": ["mamba", "attention"]}
_NO_EXPERTS = {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 48}
_FACTORS = {"lm_head_multiplier": 0.5, "embedding_multiplier": 3.0, "key_multiplier": 0.7, "ssm_in_multiplier": 1.3}
_FACTORS |= {"ssm_out_multiplier": 0.6, "attention_in_multiplier": 0.9, "attention_out_multiplier": 1.1}
_FACTORS |= {"mlp_multipliers": [0.8, 1.2], "ssm_multipliers": [0.3, 0.5, 0.7, 1.1, 0.9]}
_NEMOTRON = TINY | HEADS | {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2}
_NEMOTRON |= {"chunk_size": 8}
_EXPERTS_OF_NEMOTRON = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXPERTS_OF_NEMOTRON |= {"moe_shared_expert_intermediate_size": 48, "routed_scaling_factor": 1.5, "n_group": 2}
_JAMBA = TINY | {"num_hidden_layers": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 4}
FURTHER |= {
    "granitehybrid": ("granitemoehybrid", _HYBRID | _NO_EXPERTS),
    "granitehybrid with experts": ("granitemoehybrid", _HYBRID | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite of attention only": (
        "granitemoehybrid",
        _HYBRID | _NO_EXPERTS | {"layer_types": ["attention"] * 2, "position_embedding_type": "rope"},
    ),
    "falcon-h1": ("falcon_h1", TINY | HEADS | _STATES | _FACTORS | {"mamba_d_ssm": 128}),
    "falcon-h1 with norms": (
        "falcon_h1",
        TINY
        | HEADS
        | _STATES
        | {"mamba_d_ssm": 128, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "tie_word_embeddings": True},
    ),
    "nemotron_h": ("nemotron_h", _NEMOTRON | {"layers_block_type": ["mamba", "attention", "mlp"]}),
    "nemotron_h_moe": (
        "nemotron_h",
        _NEMOTRON | _EXPERTS_OF_NEMOTRON | {"layers_block_type": ["mamba", "attention", "moe"]},
    ),
    "nemotron_h_moe latent": (
        "nemotron_h",
        _NEMOTRON | _EXPERTS_OF_NEMOTRON | {"layers_block_type": ["mamba", "attention", "moe"], "moe_latent_size": 32},
    ),
    "jamba": (
        "jamba",
        _JAMBA | {"attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4},
    ),
}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
_PER_LAYER = {"vocab_size_per_layer_input": len(TOKENS), "sliding_window": 4}
_LONG = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192}
_GEMMA4 = TINY | HEADS | _LAYERS | _PER_LAYER | {"global_head_dim": 32}
FURTHER |= {
    "llama4": (
        "llama4_text",
        TINY
        | HEADS
        | {"num_hidden_layers": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 2}
        | {"intermediate_size_mlp": 48, "rope_parameters": _LONG | {"low_freq_factor": 1.0, "high_freq_factor": 1.0}},
    ),
    "apertus": (
        "apertus",
        TINY | HEADS | {"rope_parameters": _LONG | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "gemma3n": (
        "gemma3n_text",
        TINY
        | HEADS
        | _PER_LAYER
        | {"num_hidden_layers": 22, "num_kv_shared_layers": 2, "activation_sparsity_pattern": None},
    ),
    "gemma4": ("gemma4_text", _GEMMA4 | {"hidden_size_per_layer_input": 8, "final_logit_softcapping": 30.0}),
    "gemma4 with shared keys": (
        "gemma4_text",
        _GEMMA4
        | _LAYERS
        | {"num_hidden_layers": 4, "layer_types": _LAYERS["layer_types"] * 2, "num_kv_shared_layers": 2}
        | {"use_double_wide_mlp": True, "hidden_size_per_layer_input": 8},
    ),
    "gemma4 with experts": (
        "gemma4_text",
        _GEMMA4
        | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
}
_OF_LATENT = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
_OF_SOLAR = {k: v for k, v in _ROUTED.items() if "dense" not in k}
_OF_SOLAR |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}}
FURTHER |= {
    "gemma4 of gemma4_unified": (
        "gemma4_unified_text",
        TINY | HEADS | _LAYERS | {"sliding_window": 4, "global_head_dim": 32, "final_logit_softcapping": 30.0},
    ),
    "afmoe": (
        "afmoe",
        TINY
        | HEADS
        | {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"num_dense_layers": 1, "route_scale": 1.5, "mup_enabled": True, "sliding_window": 4},
    ),
    "exaone-moe": (
        "exaone_moe",
        TINY
        | HEADS
        | {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"sliding_window": 4, "n_group": 2},
    ),
    "jais2": ("jais2", TINY | HEADS),
    "chatglm": ("glm", TINY | HEADS | {"pad_token_id": 0}),
    "deepseek2 of glm4_moe_lite": ("glm4_moe_lite", TINY | _LATENT),
    "deepseek2 of youtu": ("youtu", TINY | {k: v for k, v in _LATENT.items() if "_lora_" in k or "head" in k}),
    "glm4moe of solar_open": ("solar_open", TINY | HEADS | _OF_SOLAR),
    "llama of internlm3": ("internlm3", TINY | HEADS),
    "llama of iquestcoder": ("iquestcoder", TINY | HEADS),
}
FURTHER |= {
    "dbrx": (
        "dbrx",
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "rope_parameters": _NARROW}
        | {"attn_config": {"clip_qkv": 2.0, "kv_n_heads": 2, "rope_theta": 5e5}}
        | {"ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 3, "moe_top_k": 2}}
        | _WORDS,
    ),
    "minicpm3": ("minicpm3", TINY | {key: _LATENT[key] for key in _OF_LATENT} | {"num_key_value_heads": 4}),
}
_SPARSE = {key: value for key, value in _LATENT.items() if key not in ("first_k_dense_replace", "n_group")}
_SPARSE |= {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "num_hidden_layers": 4, "n_group": 2}
_OF_KIMI = {key: value for key, value in _SPARSE.items() if "experts" not in key and key != "q_lora_rank"}
_SHARE = {"partial_rotary_factor": 0.334}
FURTHER |= {
    "glm-dsa": (
        "glm_moe_dsa",
        TINY
        | {key: value for key, value in _SPARSE.items() if key != "mlp_layer_types"}
        | {"first_k_dense_replace": 1, "topk_group": 1}
        # of as many heads that no two tokens have the score 0, of which each program would choose others
        | {"index_topk": 4, "index_head_dim": 64, "index_n_heads": 24}
        | {"indexer_types": ["full", "shared", "full", "shared"]},
    ),
    "kimi-linear": (
        "kimi_linear",
        TINY
        | _OF_KIMI
        | {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_head_dim": 16, "linear_num_heads": 4}
        | {"num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 2}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mimo2": (
        "mimo_v2_flash",
        TINY
        | {"num_hidden_layers": 4, "head_dim": 24, "v_head_dim": 16, "sliding_window": 4}
        | {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"layer_types": ["full_attention", *["sliding_attention"] * 3], "attention_value_scale": 0.5}
        | {"rope_parameters": {"full_attention": _NARROW | _SHARE, "sliding_attention": _NARROW | _SHARE}}
        | {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
    ),
}
WRITTEN = ["llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "stablelm", "starcoder2", "nemotron", "gemma2", "gemma3"]
WRITTEN += ["gpt2", "bloom", "mamba", "phi3", "falcon", *FURTHER]


def byte_level(split: Any = None, *, template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(TOKENS)}, [tuple(m.split()) for m in MERGES]))
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS[:3]])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=TOKENS[0], bos_token=TOKENS[1], eos_token=TOKENS[2]
    )
    made.chat_template = template
    return made


def unigram() -> PreTrainedTokenizerFast:
    """A tokenizer as T5 has it, of as many tokens as the others."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -2.5), ("ab", -2.7)]
    words += [(word, -3.0 - place / 100) for place, word in enumerate([*TOKENS[3:], "▁dead"])]
    return T5Tokenizer(vocab=words[: len(TOKENS)], extra_ids=0)


def tiny_config(architecture: str, **changes: Any) -> Any:
    """The configuration of a tiny network."""
    model_type, settings = _settings(architecture, changes)
    return AutoConfig.for_model(model_type, **settings)


def _settings(architecture: str, changes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    model_type, settings = (ARCHITECTURES | FURTHER).get(architecture, (architecture, {}))
    return model_type, settings | GRANTED.get(architecture, {}) | changes


def tiny(architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
    """A tiny network with random weights, norms and biases."""
    model_type, settings = _settings(architecture, changes)
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(len(architecture))
    network = auto_class(config).from_config(config).eval().to(dtype)
    if settings.get("tie_word_embeddings") is False and network.config.is_encoder_decoder:
        network.lm_head.weight = torch.nn.Parameter(
            network.lm_head.weight.detach().clone()
        )  # its configuration ties it
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Model(network, unigram() if network.config.is_encoder_decoder else byte_level(), architecture)


# Values that no type has by default, for attributes that tiny networks leave at their defaults.
_UNUSUAL: dict[str, Any] = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"), 3e-5),
    **dict.fromkeys(("conv_kernel", "mamba_d_conv", "linear_conv_kernel_dim"), 3),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 3),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), 20.0),
    **{"conv_L_cache": 4, "sliding_window": 4, "logit_scale": 0.3, "routed_scaling_factor": 1.7, "n_positions": 64},
    **{"first_k_dense_replace": 0, "num_dense_layers": 0, "moe_layer_start_index": 0, "n_group": 2, "topk_group": 2},
    **{"relative_attention_num_buckets": 16, "max_position_embeddings": 64, "moe_intermediate_size": 24},
    **{"shared_expert_intermediate_size": 40, "decoder_start_token_id": 1, "rope_theta": 5e4, "mamba_expand": 3},
}


# Attributes that have tiny networks of their own, or one value that llama.cpp takes for granted.
_OWN = {"qk_layernorm", "use_qk_norm", "mamba_rms_norm", "is_gated_act", "enable_moe_block"}


def held(model_type: str, architecture: GgufArchitecture) -> list[str]:
    """The attributes of a configuration that a file holds or its tensors show."""
    told = [source for source in architecture.settings.values() if isinstance(source, str | Setting)]
    return [one if isinstance(one, str) else one.attribute for one in told] + list(architecture.present)


def usual(config: Any, attribute: str) -> bool:
    """Whether an attribute has its type's default."""
    default = AutoConfig.for_model(config.model_type)
    one, other = (_of(whole.to_dict(), attribute) for whole in (config, default))
    return bool(one == other)


def _of(told: dict[str, Any], attribute: str) -> Any:
    rope = told.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    return rope.get(attribute) if attribute in ("rope_theta", "partial_rotary_factor") else told.get(attribute)


def unusual(architecture: str) -> dict[str, Any]:
    """Changes of a tiny network's settings, after which none that a file holds has its default, as far as they can."""
    config = tiny_config(architecture)
    changes: dict[str, Any] = {}
    for attribute in held(config.model_type, architecture_for(config)):
        if not usual(config, attribute):
            continue
        value = _of(config.to_dict(), attribute)
        if attribute in ("rope_theta", "partial_rotary_factor"):
            new = {"rope_theta": 5e4}.get(attribute, 0.25 if value == 0.5 else 0.5)
            rope = changes.get("rope_parameters", config.rope_parameters)
            changed = {kind: part | {attribute: new} for kind, part in rope.items() if isinstance(part, dict)}
            changes["rope_parameters"] = changed or rope | {attribute: new}
        elif isinstance(value, bool) and attribute not in _OWN:
            changes[attribute] = not value
        elif attribute in _UNUSUAL:
            changes[attribute] = _UNUSUAL[attribute]
    return changes
