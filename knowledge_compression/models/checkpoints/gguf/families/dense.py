"""The content of GGUF files of decoders with rotary embeddings and without experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf.architecture import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf.changes import PAIRED, PLUS_ONE
from knowledge_compression.models.checkpoints.gguf.settings import (
    BIASES,
    COMMON,
    LOCAL_BASE,
    PARTLY_ROTARY,
    ROOT,
    ROTARY,
    STRETCHED,
    WIDTHS,
    WINDOWS,
    YARN,
    Setting,
    Settings,
    head_width,
    only,
    rope,
)

_MEAN: Settings = {"attention.layer_norm_epsilon": "layer_norm_eps"}
_UNSCALED: Settings = {"rope.scaling.type": lambda config: "none"}


def _norms_of_64_blocks(config: Any) -> None:
    """Nothing is written: llama.cpp takes norms of queries and keys for granted from 64 blocks on."""
    only("use_qk_norm", lambda one: not one.use_qk_norm or one.num_hidden_layers >= 64, "from 64 blocks on").stored(
        config
    )


LLAMA = GgufArchitecture("llama", {**COMMON, **ROTARY, **WIDTHS, **ROOT}, PAIRED)
_WITH_BIASES = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}


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


_OF_WIDTH: Settings = {"heads": _as_wide_as_network}

DENSE: Mapping[str, GgufArchitecture] = {
    "llama": replace(LLAMA, present=_WITH_BIASES),
    "mistral": LLAMA,
    **dict.fromkeys(
        ("internlm3", "iquestcoder"),  # networks of the class LlamaForCausalLM, as which they are read
        replace(LLAMA, present=_WITH_BIASES),
    ),
    "arcee": replace(LLAMA, name="arcee", present=_WITH_BIASES),
    "smollm3": GgufArchitecture(
        "smollm3",
        {**COMMON, **ROTARY, **ROOT},
        PAIRED,
        present=_WITH_BIASES,
    ),
    "seed_oss": GgufArchitecture(
        "seed_oss",
        {**COMMON, **ROTARY, **WIDTHS, **ROOT},
        present={**BIASES, "attention_out_bias": "attn_output.bias", "mlp_bias": "ffn_up.bias"},
    ),
    "ernie4_5": GgufArchitecture(
        "ernie4_5", {**COMMON, **ROTARY, **WIDTHS, **ROOT}, present={"use_bias": "attn_q.bias"}
    ),
    "glm4": GgufArchitecture("glm4", {**COMMON, **WIDTHS, **PARTLY_ROTARY, **ROOT}, present=BIASES),
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
        {"norm.weight": PLUS_ONE},
        present={**BIASES, "mlp_bias": "ffn_up.bias"},
    ),
    "qwen2": GgufArchitecture("qwen2", {**COMMON, **ROTARY, **ROOT}),
    "qwen3": GgufArchitecture("qwen3", {**COMMON, **ROTARY, **WIDTHS, **ROOT}, present=BIASES),
    "cohere": GgufArchitecture(
        "command-r",
        {**COMMON, **ROTARY, **_UNSCALED, **_MEAN, "logit_scale": "logit_scale", "norms": _norms_of_64_blocks},
        present={**BIASES, "use_qk_norm": "attn_q_norm"},
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
    "hunyuan_v1_dense": GgufArchitecture(
        "hunyuan-dense",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            **STRETCHED,
        },
        covers=frozenset({"rope_parameters"}),
        present=BIASES,
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
    "apertus": GgufArchitecture(
        "apertus",
        {**COMMON, **WIDTHS, **ROTARY, **ROOT},
        present=BIASES,
        numbers={f"xielu.{name}": f".mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")},
    ),
    "jais2": GgufArchitecture(
        "jais2", {**COMMON, **WIDTHS, **ROTARY, "attention.layer_norm_epsilon": "layer_norm_eps"}
    ),
    "glm": GgufArchitecture(
        "chatglm",
        {**COMMON, **PARTLY_ROTARY, **ROOT, **_OF_WIDTH},
        present=BIASES,
        also=lambda told, _: {"head_dim": told["hidden_size"] // told["num_attention_heads"]},
    ),
}
