"""The content of GGUF files for further architectures, as ``gguf_families.py`` describes the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf_architectures import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf_changes import Array, Change
from knowledge_compression.models.checkpoints.gguf_settings import (
    COMMON,
    ROOT,
    ROTARY,
    Setting,
    inside,
    only,
    rope,
)


def _base_of_dbrx(config: Any) -> float:
    """The base of DBRX's rotary embeddings, which its configuration states twice.

    Raises:
        BadInput: it states two; transformers computes with one, readers of its own files with the other.
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
            "attention.q_lora_rank": only(
                "q_lora_rank", lambda config: config.q_lora_rank is not None, "if there is one"
            ),
            "attention.kv_lora_rank": "kv_lora_rank",
            "attention.key_length": Setting(
                "qk_nope_head_dim",
                lambda config: config.qk_nope_head_dim + config.qk_rope_head_dim,
                lambda value, told: value - told["qk_rope_head_dim"],
            ),
            "attention.value_length": "v_head_dim",
            "attention.head_count_kv": only(
                "num_key_value_heads",
                lambda config: config.num_key_value_heads == config.num_attention_heads,
                "if every head has its own keys",
            ),
        },
        further={r".*layers\.(\d+)\.self_attn\.kv_b_proj\.weight": ("blk.{}.attn_kv_b.weight",)},
    ),
}
