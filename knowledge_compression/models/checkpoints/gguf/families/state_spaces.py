"""The content of GGUF files of Mamba, and the parts of it that hybrids have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knowledge_compression.models.checkpoints.gguf.architecture import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf.changes import (
    COLUMN,
    NEGATIVE_EXPONENTIAL,
    NEGATIVE_EXPONENTIAL_COLUMN,
    UNCHANGED,
    WITHOUT_MIDDLE,
    Change,
    row_per_group,
)
from knowledge_compression.models.checkpoints.gguf.settings import COMMON, Setting, Settings, without

ATTENTION, STATE_SPACE = "full_attention", "linear_attention"


def with_attention(config: Any) -> list[bool]:
    """Whether each block attends."""
    return [kind == ATTENTION for kind in config.layer_types]


def keys_of_blocks() -> Setting:
    """The number of key heads of each block, 0 in blocks without attention."""
    return Setting(
        "num_key_value_heads",
        lambda config: [config.num_key_value_heads if there else 0 for there in with_attention(config)],
        lambda value, _: list(value),
    )


def states(groups: str) -> dict[str, Change]:
    """The changes of a state space's tensors, given the attribute that says how many groups its norm has."""
    return {
        "ssm_a": NEGATIVE_EXPONENTIAL_COLUMN,
        "ssm_dt": UNCHANGED,  # before ssm_d, which its name contains
        "ssm_d": COLUMN,
        "ssm_conv1d.weight": WITHOUT_MIDDLE,
        "ssm_norm": row_per_group(groups),
    }


MAMBA: Settings = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
}
WITHOUT_KEYS = without(COMMON, "attention.head_count_kv")
_MAMBAS: Settings = {
    "context_length": lambda config: 1 << 20,  # the network has no limit, but llama.cpp requires one
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": lambda config: 0,
    "attention.head_count": lambda config: 0,
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
}

STATE_SPACES: Mapping[str, GgufArchitecture] = {
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
        states("n_groups"),
        frozenset({"time_step_rank", "chunk_size", "time_step_min"}),
        also=lambda told, _: {"expand": told["num_heads"] * told["head_dim"] // told["hidden_size"]},
    ),
}
