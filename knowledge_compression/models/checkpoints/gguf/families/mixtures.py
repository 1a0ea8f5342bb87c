"""The content of GGUF files of decoders with experts and ordinary attention."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf.architecture import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf.changes import (
    BANK_HALVES,
    FLAT,
    GATE_AND_UP_IN_TURN,
    PAIRED,
    ROW,
    Array,
    Change,
)
from knowledge_compression.models.checkpoints.gguf.families.dense import LLAMA
from knowledge_compression.models.checkpoints.gguf.settings import (
    BIASES,
    COMMON,
    EXPERTS,
    LOCAL_EXPERTS,
    OWN_KEYS,
    PARTLY_ROTARY,
    ROOT,
    ROTARY,
    SIGMOID,
    SIGMOIDS,
    STRETCHED,
    WIDTHS,
    WINDOWS,
    YARN,
    Setting,
    Told,
    inside,
    leading_dense,
    rope,
    without,
)


def _of_every_block(attribute: str) -> Callable[[Any], int]:
    """A number that a configuration may state for each block.

    Raises:
        BadInput: the blocks differ.
    """

    def store(config: Any) -> int:
        value = getattr(config, attribute)
        values = set(value) if isinstance(value, list) else {value}
        if len(values) > 1:
            raise BadInput(
                f"output.save_model=gguf: {config.model_type} has {attribute}={value}; llama.cpp takes one number for "
                "all blocks"
            )
        return int(values.pop())

    return store


_UNNORMALISED = 128  # the number of experts from which llama.cpp recognises a Llama 4 without norms of queries and keys


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


_GLM4_MOE = GgufArchitecture(
    "glm4moe",
    {**COMMON, **WIDTHS, **PARTLY_ROTARY, **ROOT, **SIGMOIDS},
    BANK_HALVES,
    present={"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm"},
)

MIXTURES: Mapping[str, GgufArchitecture] = {
    "mixtral": replace(
        LLAMA, settings={**LLAMA.settings, **LOCAL_EXPERTS}, changes={**PAIRED, **BANK_HALVES}, marks="ffn_gate_inp"
    ),
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
        present=BIASES,
    ),
    "gpt_oss": GgufArchitecture(
        "gpt-oss",
        {
            **COMMON,
            **ROTARY,
            **YARN,
            **WIDTHS,
            **ROOT,
            **LOCAL_EXPERTS,
            "expert_feed_forward_length": lambda config: config.intermediate_size,
            "attention.sliding_window": "sliding_window",
        },
        GATE_AND_UP_IN_TURN,
        present=BIASES,
    ),
    "glm4_moe": _GLM4_MOE,
    "dots1": GgufArchitecture(
        "dots1",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            **SIGMOIDS,
            "attention.head_count_kv": OWN_KEYS,
        },
        BANK_HALVES,
        present=BIASES,
    ),
    "ernie4_5_moe": GgufArchitecture(
        "ernie4_5-moe",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_count": "moe_num_shared_experts",
            "expert_shared_feed_forward_length": lambda config: (
                config.moe_num_shared_experts * config.moe_intermediate_size
            ),
        },
        {**BANK_HALVES, "exp_probs_b": ROW},
        present={"use_bias": "attn_q.bias"},
    ),
    "minimax_m2": GgufArchitecture(
        "minimax-m2",
        {
            **COMMON,
            **WIDTHS,
            **PARTLY_ROTARY,
            **ROOT,
            **LOCAL_EXPERTS,
            "expert_feed_forward_length": lambda config: config.intermediate_size,
            "expert_gating_func": lambda config: SIGMOID,
        },
        BANK_HALVES,
    ),
    "hunyuan_v1_moe": GgufArchitecture(
        "hunyuan-moe",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            **STRETCHED,
            "expert_count": "num_experts",
            "expert_used_count": Setting("moe_topk", _of_every_block("moe_topk")),
            "expert_shared_count": lambda config: 1,
            "expert_feed_forward_length": lambda config: config.intermediate_size,
            "expert_shared_feed_forward_length": lambda config: config.intermediate_size,
        },
        BANK_HALVES,
        covers=frozenset({"rope_parameters", "moe_topk"}),
        present=BIASES,
    ),
    "olmoe": GgufArchitecture(
        "olmoe",
        {
            **COMMON,
            **ROTARY,
            **ROOT,
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "attention.head_count_kv": OWN_KEYS,
        },
        BANK_HALVES,
    ),
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
    "afmoe": GgufArchitecture(
        "afmoe",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            **EXPERTS,
            "expert_shared_count": "num_shared_experts",
            "leading_dense_block_count": "num_dense_layers",
            "expert_weights_norm": lambda config: True,
            "expert_weights_scale": "route_scale",
            "expert_gating_func": lambda config: SIGMOID,
            "attention.sliding_window": "sliding_window",
        },
        BANK_HALVES,
        covers=frozenset({"global_attn_every_n_layers"}),
        given={"mup_enabled": True},
        present=BIASES,
    ),
    "exaone_moe": GgufArchitecture(
        "exaone-moe",
        {
            **COMMON,
            **WIDTHS,
            **ROTARY,
            **ROOT,
            **EXPERTS,
            **WINDOWS,
            "expert_shared_count": "num_shared_experts",
            "expert_shared_feed_forward_length": lambda config: (
                config.num_shared_experts * config.moe_intermediate_size
            ),
            "expert_weights_norm": "norm_topk_prob",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
            "expert_gating_func": lambda config: SIGMOID,
            "leading_dense_block_count": Setting("first_k_dense_replace", leading_dense),
            "nextn_predict_layers": lambda config: 0,
            "rope.scaling.type": lambda config: "none",
        },
        BANK_HALVES,
        covers=frozenset({"sliding_window_pattern", "mlp_layer_types", "first_k_dense_replace"}),
    ),
    "solar_open": replace(
        _GLM4_MOE,
        settings={**COMMON, **WIDTHS, **PARTLY_ROTARY, **ROOT, **SIGMOIDS}
        | {"leading_dense_block_count": lambda config: 0},
    ),
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
