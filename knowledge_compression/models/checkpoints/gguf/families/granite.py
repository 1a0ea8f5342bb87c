"""The content of GGUF files of Granite, with and without state spaces."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf.architecture import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf.changes import BANK_HALVES, PAIRED, SHARED_HALVES, half
from knowledge_compression.models.checkpoints.gguf.families.state_spaces import (
    ATTENTION,
    MAMBA,
    STATE_SPACE,
    WITHOUT_KEYS,
    keys_of_blocks,
    states,
    with_attention,
)
from knowledge_compression.models.checkpoints.gguf.settings import (
    BIASES,
    COMMON,
    LOCAL_EXPERTS,
    ROOT,
    ROTARY,
    SCALES,
    Setting,
    Settings,
    Told,
)

_GRANITE = GgufArchitecture("granite", {**COMMON, **ROTARY, **ROOT, **SCALES}, PAIRED, present=BIASES)


def _attends_only(config: Any) -> bool:
    return all(with_attention(config))


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


_OF_MAMBA = frozenset(
    f"mamba_{name}" for name in ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand", "chunk_size")
)
_MIXED: Settings = {
    **WITHOUT_KEYS,
    **ROTARY,
    **ROOT,
    **SCALES,
    **LOCAL_EXPERTS,
    "expert_shared_feed_forward_length": "shared_intermediate_size",
    "attention.head_count_kv": keys_of_blocks(),
    **MAMBA,
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
    _MIXED,
    {**PAIRED, **BANK_HALVES, **SHARED_HALVES, **states("mamba_n_groups")},
    frozenset({"mamba_expand", "mamba_chunk_size", "position_embedding_type"}),
    present=BIASES,
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
    present=BIASES,
    further=_DENSE,
)

GRANITES: Mapping[str, GgufArchitecture] = {
    "granite": replace(_GRANITE, present={**BIASES, "mlp_bias": "ffn_up.bias"}),
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
    "granitemoehybrid": replace(
        _GRANITE_HYBRID,
        others=(
            (lambda config: _attends_only(config) and not config.num_local_experts, _GRANITE_ALONE),
            (
                lambda config: not config.num_local_experts,
                replace(
                    _GRANITE_HYBRID,
                    settings={**_MIXED, **_DENSE_WIDTH},
                    covers=_GRANITE_HYBRID.covers | {"intermediate_size", "num_experts_per_tok"},
                    changes={**_GRANITE_HYBRID.changes, **_HALVES},
                    given={"num_local_experts": 0},
                    further=_DENSE,
                    marks="",
                ),
            ),
        ),
    ),
}
