"""The content of GGUF files of networks with both attention and state spaces: Falcon H1, Nemotron-H, Jamba."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf.architecture import GgufArchitecture
from knowledge_compression.models.checkpoints.gguf.changes import (
    BANK_HALVES,
    NEGATIVE_EXPONENTIAL,
    PAIRED,
    WITHOUT_MIDDLE,
    scaled,
)
from knowledge_compression.models.checkpoints.gguf.families.state_spaces import (
    ATTENTION,
    MAMBA,
    STATE_SPACE,
    WITHOUT_KEYS,
    keys_of_blocks,
    states,
)
from knowledge_compression.models.checkpoints.gguf.settings import COMMON, ROOT, ROTARY, WIDTHS, Setting, Settings, Told


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
        **MAMBA,
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


def _widths_of_blocks(attribute: str) -> Setting:
    """The width of each feed-forward block, 0 in the others."""

    def store(config: Any) -> list[int]:
        kinds = set(config.layer_types) & {"mlp", "moe"}
        if len(kinds) > 1:
            raise BadInput(
                f"output.save_model=gguf: some feed-forward networks of this {config.model_type} have experts and "
                "some have none; llama.cpp takes one kind"
            )
        return [getattr(config, attribute) if kind in kinds else 0 for kind in config.layer_types]

    return Setting(attribute, store, lambda value, _: list(value))


def _nemotron_blocks(attribute: str, kind: str) -> Callable[[Told, Collection[str]], Mapping[str, Any]]:
    """The kind of each block, from the keys and widths of all blocks."""

    def also(told: Told, tensors: Collection[str]) -> Mapping[str, Any]:
        keys, widths = told["num_key_value_heads"], told[attribute]
        other = {attribute: max(widths)} if any(widths) else {}
        kinds = [ATTENTION if key else kind if width else STATE_SPACE for key, width in zip(keys, widths, strict=True)]
        return {"num_key_value_heads": max(keys), "layers_block_type": kinds, **other}

    return also


_NEMOTRON: Settings = {
    **WITHOUT_KEYS,
    **WIDTHS,
    "attention.head_count_kv": keys_of_blocks(),
    "feed_forward_length": _widths_of_blocks("intermediate_size"),
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon": lambda config: config.layer_norm_epsilon,
    "rope.dimension_count": lambda config: config.hidden_size // config.num_attention_heads,  # nothing is rotated
    "rope.scaling.finetuned": lambda config: False,
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "ssm_state_size",
    "ssm.group_count": "n_groups",
    "ssm.time_step_rank": "mamba_num_heads",
    "ssm.inner_size": Setting(
        "mamba_head_dim",
        lambda config: config.mamba_head_dim * config.mamba_num_heads,
        lambda value, told: value // told["mamba_num_heads"],
    ),
}
_MIXER = r".*layers\.(\d+)\.mixer\."
_TENSORS_OF_MIXER = {
    **{f"{name}_proj": f"attn_{name}" for name in "qkv"},
    **{"o_proj": "attn_output", "up_proj": "ffn_up", "down_proj": "ffn_down", "gate": "ffn_gate_inp"},
    **{"in_proj": "ssm_in", "out_proj": "ssm_out", "norm": "ssm_norm", "conv1d": "ssm_conv1d"},
    **{"fc1_latent_proj": "ffn_latent_down", "fc2_latent_proj": "ffn_latent_up"},
    **{f"shared_experts.{name}_proj": f"ffn_{name}_shexp" for name in ("up", "down")},
}
_NEMOTRON_H = GgufArchitecture(
    "nemotron_h",
    _NEMOTRON,
    {**PAIRED, **states("n_groups")},  # as in llama.cpp's conversion, although nothing is rotated
    frozenset({"expand", "chunk_size", "num_logits_to_keep", "moe_shared_expert_overlap", "mtp_layers_block_type"})
    | {"n_routed_experts", "n_shared_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size"}
    | {"moe_latent_size", "num_experts_per_tok", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob"}
    | {"use_mamba_kernels", "mamba_ssm_cache_dtype", "time_step_limit", "attention_bias"},
    also=_nemotron_blocks("intermediate_size", "mlp"),
    further={
        **{
            _MIXER + name.replace(".", r"\.") + rf"\.{ending}": (f"blk.{{}}.{tensor}.{ending}",)
            for name, tensor in _TENSORS_OF_MIXER.items()
            for ending in ("weight", "bias")
        },
        _MIXER + "A_log": ("blk.{}.ssm_a",),
        _MIXER + "D": ("blk.{}.ssm_d",),
        _MIXER + r"experts\.up_proj": ("blk.{}.ffn_up_exps.weight",),
    },
)
_NEMOTRON_H_MOE = replace(
    _NEMOTRON_H,
    name="nemotron_h_moe",
    settings={
        **_NEMOTRON,
        "feed_forward_length": _widths_of_blocks("moe_intermediate_size"),
        "expert_count": "n_routed_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": lambda config: config.moe_intermediate_size,
        "expert_shared_count": "n_shared_experts",
        "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
        "expert_weights_norm": "norm_topk_prob",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "moe_latent_size": "moe_latent_size",
    },
    covers=frozenset({"expand", "chunk_size", "num_logits_to_keep", "moe_shared_expert_overlap"})
    | {"mtp_layers_block_type", "intermediate_size", "use_mamba_kernels", "mamba_ssm_cache_dtype", "time_step_limit"}
    | {"attention_bias"},
    also=_nemotron_blocks("moe_intermediate_size", "moe"),
)


def _spaced(places: Sequence[int], blocks: int) -> tuple[int, int]:
    """The period and offset of evenly spaced blocks, as Jamba's configuration has them.

    Raises:
        ValueError: they are not evenly spaced.
    """
    if not places:
        return blocks + 1, blocks
    period = places[1] - places[0] if len(places) > 1 else blocks
    if list(places) != [place for place in range(blocks) if place % period == places[0] % period]:
        raise ValueError(f"blocks {places} of {blocks} are not evenly spaced")
    return period, places[0]


def _jamba_blocks(told: Told, tensors: Collection[str]) -> Mapping[str, Any]:
    keys, blocks = told["num_key_value_heads"], told["num_hidden_layers"]
    attention = [place for place, count in enumerate(keys) if count]
    experts = [place for place in range(blocks) if f"blk.{place}.ffn_gate_inp.weight" in tensors]
    found = {"num_key_value_heads": max(keys)}
    for name, places in (("attn", attention), ("expert", experts)):
        period, offset = _spaced(places, blocks)
        found |= {f"{name}_layer_period": period, f"{name}_layer_offset": offset}
    return found


_JAMBA = GgufArchitecture(
    "jamba",
    {
        **WITHOUT_KEYS,
        **ROOT,
        "attention.head_count_kv": keys_of_blocks(),
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "ssm.conv_kernel": "mamba_d_conv",
        "ssm.state_size": "mamba_d_state",
        "ssm.time_step_rank": "mamba_dt_rank",
        "ssm.inner_size": Setting(
            "mamba_expand",
            lambda config: config.mamba_expand * config.hidden_size,
            lambda value, told: value // told["hidden_size"],
        ),
    },
    {"ssm_a": NEGATIVE_EXPONENTIAL, "ssm_conv1d.weight": WITHOUT_MIDDLE, **BANK_HALVES},
    frozenset({f"{name}_layer_{number}" for name in ("attn", "expert") for number in ("period", "offset")})
    | {"use_mamba_kernels", "use_mambapy", "use_associative_scan"},
    also=_jamba_blocks,
)

HYBRIDS: Mapping[str, GgufArchitecture] = {
    "falcon_h1": _FALCON_H1,
    "nemotron_h": replace(_NEMOTRON_H, others=((lambda config: "moe" in config.layer_types, _NEMOTRON_H_MOE),)),
    "jamba": _JAMBA,
}
