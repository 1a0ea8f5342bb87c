"""Settings of GGUF files under the keys of its specification, and the attributes of configurations that they hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from knowledge_compression.errors import BadInput

Told = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """One value of a file, and an attribute of the configuration.

    Attributes:
        attribute: its name in transformers.
        store: returns the file's value for a configuration; by default the attribute itself.
        load: returns the attribute for the file's value and the attributes read before it; by default the value itself.
    """

    attribute: str
    store: Callable[[Any], Any] | None = None
    load: Callable[[Any, Told], Any] | None = None

    def stored(self, config: Any) -> Any:
        """The file's value; None where the configuration has none."""
        return self.store(config) if self.store else getattr(config, self.attribute, None)

    def loaded(self, value: Any, told: Told) -> Any:
        """The attribute."""
        return self.load(value, told) if self.load else value


Settings = Mapping[str, str | Setting | Callable[[Any], Any]]
"""Each key without the architecture's name, and its attribute; a key with a function is only written."""


# Endings of keys whose values are floats, also where a configuration holds whole numbers; llama.cpp reads nothing else.
FLOATS = (
    *("freq_base", "freq_base_swa", "epsilon", ".scale", "_scale", "softcapping", "clamp_kqv", "max_alibi_bias"),
    *("scaling.factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier"),
)

# Types of scaled rotary embeddings that files written here can express.
SCALED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "exaone4", "llama4_text", "apertus"), ("llama3",)),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), ("proportional",)),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe"), ("dynamic",)),
    **dict.fromkeys(("gpt_oss", "deepseek_v2", "deepseek_v3", "olmo3", "ministral3"), ("yarn",)),
}


def rope(config: Any) -> Mapping[str, Any]:
    """The settings of rotary embeddings; those of the global layers if the others differ.

    Raises:
        BadInput: they are scaled in a way that files written here cannot express.
    """
    told = config.rope_parameters or {}
    told = told.get("full_attention", told)
    known = ("default", *SCALED.get(config.model_type, ()))
    if (kind := told.get("rope_type", "default")) not in known:
        raise BadInput(
            f"output.save_model=gguf writes rotary embeddings of the type {' or '.join(known)}, but this "
            f"{config.model_type} has {kind}"
        )
    factor, stated = told.get("factor"), told.get("attention_factor")
    if stated is not None and not math.isclose(stated, 0.1 * math.log(factor) + 1, rel_tol=1e-6):
        raise BadInput(
            f"output.save_model=gguf: the rotary embeddings of this {config.model_type} have "
            f"attention_factor={stated}, but readers of GGUF files take the usual one, 0.1 ln(factor) + 1"
        )
    return told


def head_width(config: Any) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def of_attention(config: Any, attribute: str, kind: str) -> int:
    """A number that blocks with one kind of attention may have of their own; that of the others if none has it.

    Raises:
        BadInput: these blocks have several.
    """
    every = range(config.num_hidden_layers)
    places = [place for place in every if config.layer_types[place] == kind] or every
    found = {getattr(config.per_layer_config[place], attribute) for place in places}
    if len(found) != 1:
        raise BadInput(
            f"output.save_model=gguf: the blocks of {kind} of this {config.model_type} have {attribute}="
            f"{sorted(found)}; a GGUF file has one"
        )
    return int(found.pop())


def rotated(config: Any) -> int:
    """The number of rotated channels of a head."""
    return int(head_width(config) * rope(config).get("partial_rotary_factor", 1.0))


def _told_width(told: Told) -> int:
    return int(told.get("head_dim") or told["hidden_size"] // told["num_attention_heads"])


def _head_width_as_scaled(config: Any) -> int:
    """The width of heads, by whose square root llama.cpp divides attention scores.

    Raises:
        BadInput: the network divides by another number, which a file cannot express.
    """
    if (divided := config.query_pre_attn_scalar) != (width := head_width(config)):
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} has query_pre_attn_scalar={divided}, which a GGUF file "
            f"cannot express; llama.cpp uses the width of a head, {width}"
        )
    return width


def only(attribute: str, taken: Callable[[Any], bool], where: str) -> Setting:
    """A setting that llama.cpp takes from a file only in some networks; any other is refused."""

    def store(config: Any) -> Any:
        value = getattr(config, attribute, None)
        if not taken(config):
            raise BadInput(
                f"output.save_model=gguf: {config.model_type} has {attribute}={value}, which llama.cpp takes only "
                f"{where}"
            )
        return value

    return Setting(attribute, store)


def stretched_base(config: Any) -> float:
    """The base of HunYuan's rotary embeddings, which a constant stretches.

    Raises:
        BadInput: the text's length stretches it.
    """
    told, width = rope(config), head_width(config)
    if told.get("rope_type") == "default":
        return float(told["rope_theta"])
    if (constant := told.get("alpha")) is None:
        raise BadInput(
            f"output.save_model=gguf: the rotary embeddings of this {config.model_type} depend on the length of a "
            "text, which a GGUF file cannot express"
        )
    return float(told["rope_theta"] * constant ** (width / (width - 2)))


def without(settings: Settings, *keys: str) -> Settings:
    """The other settings."""
    return {key: value for key, value in settings.items() if key not in keys}


COMMON: Settings = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
WIDTHS: Settings = {"attention.key_length": Setting("head_dim", head_width), "attention.value_length": head_width}
SCALED_WIDTHS: Settings = {
    "attention.key_length": Setting("head_dim", _head_width_as_scaled),
    "attention.value_length": _head_width_as_scaled,
}
ROTARY: Settings = {
    "rope.freq_base": Setting(
        "rope_theta", lambda config: rope(config).get("rope_theta"), lambda value, _: float(value)
    ),
    "rope.dimension_count": rotated,
}
PARTLY_ROTARY: Settings = {
    **ROTARY,
    "rope.dimension_count": Setting(
        "partial_rotary_factor", rotated, lambda value, told: float(value) / _told_width(told)
    ),
}


def _yarn(name: str, factor: float = 1.0) -> Callable[[Any], Any]:
    """A parameter of rotary embeddings of the type YaRN; None if they are of another type or have none."""

    def stored(config: Any) -> Any:
        told = rope(config)
        value = told.get(name) if told.get("rope_type") == "yarn" else None
        return value if value is None or factor == 1 else factor * value

    return stored


YARN: Settings = {
    "rope.scaling.type": _yarn("rope_type"),
    "rope.scaling.factor": _yarn("factor"),
    "rope.scaling.original_context_length": _yarn("original_max_position_embeddings"),
    "rope.scaling.yarn_beta_fast": _yarn("beta_fast"),
    "rope.scaling.yarn_beta_slow": _yarn("beta_slow"),
    "rope.scaling.yarn_log_multiplier": _yarn("mscale_all_dim", 0.1),  # so that llama.cpp reads DeepSeek's
}
SCALES: Settings = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
WINDOWS: Settings = {
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": Setting(
        "layer_types",
        lambda config: [kind == "sliding_attention" for kind in config.layer_types],
        lambda value, _: ["sliding_attention" if one else "full_attention" for one in value],
    ),
}
LOCAL_BASE: Settings = {"rope.freq_base_swa": lambda config: config.rope_parameters["sliding_attention"]["rope_theta"]}
ROOT: Settings = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
EXPERTS: Settings = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
LOCAL_EXPERTS: Settings = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}


def inside(part: str, name: str, stored: Callable[[Any], Any], loaded: Callable[[Any], Any]) -> Setting:
    """A setting that a configuration holds in one of its own, as MPT's and DBRX's do.

    Args:
        part: the attribute that is a configuration.
        name: the setting in it.
        stored, loaded: convert its value to the file's, and back.
    """

    def store(config: Any) -> Any:
        value = getattr(getattr(config, part), name)
        return None if value is None else stored(value)

    return Setting(part, store, lambda value, told: told.get(part, {}) | {name: loaded(value)})


OWN_KEYS = only(
    "num_key_value_heads",
    lambda config: config.num_key_value_heads == config.num_attention_heads,
    "if every head has its own keys",
)


SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers for how a router's scores become weights
ROUTED: Settings = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "leading_dense_block_count": "first_k_dense_replace",
}
SIGMOIDS: Settings = {
    **ROUTED,
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_gating_func": lambda config: SIGMOID,
    "expert_weights_norm": "norm_topk_prob",
}
STRETCHED: Settings = {"rope.freq_base": Setting("rope_theta", stretched_base, lambda value, _: float(value))}
BIASES = {"attention_bias": "attn_q.bias"}  # a network has biases of attention if its file has these


def leading_dense(config: Any) -> int:
    """The number of blocks before the first with experts.

    Raises:
        BadInput: a later block has none.
    """
    kinds = list(config.mlp_layer_types)
    count = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if "dense" in kinds[count:]:
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} has mlp_layer_types={kinds}; llama.cpp takes blocks without "
            "experts only before those with experts"
        )
    return count
