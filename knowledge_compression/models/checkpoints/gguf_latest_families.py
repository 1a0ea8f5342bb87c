"""The content of GGUF files for architectures of 2025, as ``gguf_families.py`` describes the others."""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_compression.models.checkpoints.gguf_architectures import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf_changes import BANK_HALVES
from knowledge_compression.models.checkpoints.gguf_settings import (
    COMMON,
    LOCAL_EXPERTS,
    ROOT,
    ROTARY,
    WIDTHS,
)

_BIASES = {"attention_bias": "attn_q.bias"}
_UNNORMALISED = 128  # the number of experts from which llama.cpp recognises a Llama 4 without norms of queries and keys

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
}
