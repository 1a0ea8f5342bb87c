"""The content of GGUF files for networks with both attention and state spaces, as ``gguf_families.py`` describes the
others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf_architectures import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf_changes import (
    BANK_HALVES,
    COLUMN,
    NEGATIVE_EXPONENTIAL_COLUMN,
    PAIRED,
    SHARED_HALVES,
    UNCHANGED,
    WITHOUT_MIDDLE,
    Change,
    half,
    row_per_group,
    scaled,
)
from knowledge_compression.models.checkpoints.gguf_settings import (
    COMMON,
    LOCAL_EXPERTS,
    ROOT,
    ROTARY,
    SCALES,
    WIDTHS,
    Setting,
    Settings,
    Told,
    without,
)

ATTENTION, STATE_SPACE = "full_attention", "linear_attention"
_BIASES = {"attention_bias": "attn_q.bias"}


def _attends_only(config: Any) -> bool:
    return all(_with_attention(config))


def _with_attention(config: Any) -> list[bool]:
    return [kind == ATTENTION for kind in config.layer_types]


def keys_of_blocks() -> Setting:
    """The number of key heads of each block, 0 in blocks without attention."""
    return Setting(
        "num_key_value_heads",
        lambda config: [config.num_key_value_heads if there else 0 for there in _with_attention(config)],
        lambda value, _: list(value),
    )


def _kinds_of_blocks(told: Told, tensors: Collection[str]) -> Mapping[str, Any]:
    keys = told["num_key_value_heads"]
    return {
        "num_key_value_heads": max(keys),
        "layer_types": [ATTENTION if count else STATE_SPACE for count in keys],
    }


def _doubled(config: Any) -> int:
    """The width of a state space, for which llama.cpp has a single choice.

    Raises:
        BadInput: it is not twice the network's.
    """
    if (inner := config.mamba_n_heads * config.mamba_d_head) != 2 * config.hidden_size:
        raise BadInput(
            f"output.save_model=gguf: the state spaces of this {config.model_type} are {inner} wide; llama.cpp takes "
            f"only twice the network's width, {2 * config.hidden_size}"
        )
    return int(inner)


def states(groups: str) -> dict[str, Change]:
    """The changes of a state space's tensors, given the attribute that says how many groups its norm has."""
    return {
        "ssm_a": NEGATIVE_EXPONENTIAL_COLUMN,
        "ssm_dt": UNCHANGED,  # before ssm_d, which its name contains
        "ssm_d": COLUMN,
        "ssm_conv1d.weight": WITHOUT_MIDDLE,
        "ssm_norm": row_per_group(groups),
    }


_MAMBA: Settings = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
}
_OF_MAMBA = frozenset(
    f"mamba_{name}" for name in ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand", "chunk_size")
)
WITHOUT_KEYS = without(COMMON, "attention.head_count_kv")
_GRANITE: Settings = {
    **WITHOUT_KEYS,
    **ROTARY,
    **ROOT,
    **SCALES,
    **LOCAL_EXPERTS,
    "expert_shared_feed_forward_length": "shared_intermediate_size",
    "attention.head_count_kv": keys_of_blocks(),
    **_MAMBA,
    "ssm.time_step_rank": "mamba_n_heads",
    "ssm.inner_size": Setting("mamba_d_head", _doubled, lambda value, told: value // told["mamba_n_heads"]),
    "rope.scaling.finetuned": Setting(
        "position_embedding_type",
        lambda config: config.position_embedding_type == "rope",
        lambda value, _: "rope" if value else None,
    ),
}
_GRANITE_HYBRID = GgufArchitecture(
    "granitehybrid",
    _GRANITE,
    {**PAIRED, **BANK_HALVES, **SHARED_HALVES, **states("mamba_n_groups")},
    frozenset({"mamba_expand", "mamba_chunk_size", "position_embedding_type"}),
    present=_BIASES,
    also=_kinds_of_blocks,
    marks="ffn_gate_inp",
)
# The feed-forward network without experts, which is the shared expert in transformers.
_DENSE = {
    r".*layers\.(\d+)\.shared_mlp\.input_linear\.weight": ("blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"),
    r".*layers\.(\d+)\.shared_mlp\.output_linear\.weight": ("blk.{}.ffn_down.weight",),
}
_DENSE_WIDTH: Settings = {
    "feed_forward_length": "shared_intermediate_size",
    "expert_count": lambda config: 0,
    "expert_used_count": lambda config: 0,
}
_HALVES = {"ffn_gate.": half(0), "ffn_up.": half(1)}


def _rotary(config: Any) -> bool:
    """Whether positions are rotated, as they always are in a file without state spaces.

    Raises:
        BadInput: the network has none.
    """
    if config.position_embedding_type != "rope":
        raise BadInput(
            f"output.save_model=gguf: this {config.model_type} has only attention, and position_embedding_type="
            f"{config.position_embedding_type}; readers of such files assume rope"
        )
    return True


# Networks of the type without any state space are written as Granites, as which they are read.
_GRANITE_ALONE = GgufArchitecture(
    "granite",
    {**COMMON, **ROTARY, **ROOT, **SCALES, **_DENSE_WIDTH, "rope.scaling.finetuned": _rotary},
    {**PAIRED, **_HALVES},
    _OF_MAMBA
    | {"layer_types", "position_embedding_type", "intermediate_size", "shared_intermediate_size", "num_local_experts"}
    | {"num_experts_per_tok", "time_step_limit", "mamba_conv_bias", "mamba_proj_bias"},
    present=_BIASES,
    further=_DENSE,
)


def _scaled_inputs(config: Any) -> Sequence[float]:
    """The factor of each row of Falcon H1's joint projection: gates, inputs, two kinds of states, time steps."""
    states = config.mamba_n_groups * config.mamba_d_state
    widths = (config.mamba_d_ssm, config.mamba_d_ssm, states, states, config.mamba_n_heads)
    factors = (config.ssm_in_multiplier * factor for factor in config.ssm_multipliers)
    return [factor for factor, width in zip(factors, widths, strict=True) for _ in range(width)]


def _separate_head(config: Any) -> None:
    """Nothing is written: embeddings and head are one matrix, or two.

    Raises:
        BadInput: they are one matrix with two factors.
    """
    if config.tie_word_embeddings and config.embedding_multiplier != config.lm_head_multiplier:
        raise BadInput(
            f"output.save_model=gguf: embeddings and head of this {config.model_type} are one matrix with two factors, "
            f"{config.embedding_multiplier} and {config.lm_head_multiplier}, which a GGUF file cannot express"
        )


def _gated_before_norm(config: Any) -> None:
    """Nothing is written: llama.cpp has one order.

    Raises:
        BadInput: the network has the other.
    """
    if config.mamba_rms_norm and config.mamba_norm_before_gate:
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} has mamba_norm_before_gate=True; llama.cpp takes the norm "
            "after the gate"
        )


_FACTORS = frozenset(f"{name}_multiplier" for name in ("lm_head", "embedding", "key", "ssm_in", "ssm_out"))
_FACTORS |= {"attention_in_multiplier", "attention_out_multiplier", "mlp_multipliers", "ssm_multipliers"}
_FALCON_H1 = GgufArchitecture(
    "falcon-h1",
    {
        **COMMON,
        **WIDTHS,
        **ROOT,
        **_MAMBA,
        "rope.freq_base": ROTARY["rope.freq_base"],
        "ssm.time_step_rank": "mamba_n_heads",
        "ssm.inner_size": "mamba_d_ssm",
        "head": _separate_head,
        "gates": _gated_before_norm,
    },
    {
        **states("mamba_n_groups"),
        "token_embd": scaled(lambda config: config.embedding_multiplier),
        ".attn_q.": scaled(lambda config: config.attention_in_multiplier),
        ".attn_k.": scaled(lambda config: config.attention_in_multiplier * config.key_multiplier),
        ".attn_v.": scaled(lambda config: config.attention_in_multiplier),
        ".attn_output.": scaled(lambda config: config.attention_out_multiplier),
        "output.weight": scaled(lambda config: config.lm_head_multiplier),  # after attn_output, which contains it
        "ssm_in": scaled(_scaled_inputs),
        "ssm_out": scaled(lambda config: config.ssm_out_multiplier),
        "ffn_gate": scaled(lambda config: config.mlp_multipliers[0]),
        "ffn_down": scaled(lambda config: config.mlp_multipliers[1]),
    },
    _FACTORS | {"mamba_expand", "mamba_chunk_size", "mamba_norm_before_gate", "num_logits_to_keep"},
    given={"mamba_norm_before_gate": False},
    present={"mamba_rms_norm": "ssm_norm"},
    also=lambda told, _: {"mamba_d_head": told["mamba_d_ssm"] // told["mamba_n_heads"]},
    further={r".*layers\.(\d+)\.pre_ff_layernorm\.weight": ("blk.{}.ffn_norm",)},
)


HYBRID: Mapping[str, GgufArchitecture] = {
    "granitemoehybrid": replace(
        _GRANITE_HYBRID,
        others=(
            (lambda config: _attends_only(config) and not config.num_local_experts, _GRANITE_ALONE),
            (
                lambda config: not config.num_local_experts,
                replace(
                    _GRANITE_HYBRID,
                    settings={**_GRANITE, **_DENSE_WIDTH},
                    covers=_GRANITE_HYBRID.covers | {"intermediate_size", "num_experts_per_tok"},
                    changes={**_GRANITE_HYBRID.changes, **_HALVES},
                    given={"num_local_experts": 0},
                    further=_DENSE,
                    marks="",
                ),
            ),
        ),
    ),
    "falcon_h1": _FALCON_H1,
}
