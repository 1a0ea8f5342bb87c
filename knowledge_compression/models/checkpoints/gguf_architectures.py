"""What a GGUF file says of each architecture that is written: its settings, and how its tensors differ from the
network's.

The tensors' names are those of the library gguf, found by transformers' table; here stand the settings under the keys
of the GGUF specification that llama.cpp asks for, and the changes of layout that llama.cpp's own conversion makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf_rope import FREQUENCIES, llama3_divisors

Array = NDArray[Any]
Settings = dict[str, str | Callable[[Any], Any]]
Change = Callable[[Array, Any], Array]
"""Makes of a network's tensor the one of the file, given the configuration.

Matrices come as ``[..., out_features, in_features]`` or, encoded, as ``[..., out_features, bytes]``, so that a change
may move whole rows alone; tensors of one dimension, and convolutions, are never encoded.
"""


@dataclass(frozen=True)
class GgufArchitecture:
    """An architecture as GGUF describes it.

    Attributes:
        name: GGUF's name for it.
        settings: each key, without the architecture's name in front, and the attribute of the configuration that it
            holds, or a function of the configuration; a value of None is left out.
        changes: what becomes of tensors whose name in the file contains the key.
        covers: attributes of the configuration that functions in ``settings`` look at, or that nothing in the network
            depends on.
    """

    name: str
    settings: Settings
    changes: Mapping[str, Change] = field(default_factory=dict)
    covers: frozenset[str] = frozenset()

    def values(self, config: Any) -> Iterator[tuple[str, Any]]:
        """Every key with its value."""
        for key, source in self.settings.items():
            value = getattr(config, source, None) if isinstance(source, str) else source(config)
            if value is not None:
                yield f"{self.name}.{key}", value

    @property
    def expressed(self) -> set[str]:
        """The attributes of a configuration that a file holds."""
        return {source for source in self.settings.values() if isinstance(source, str)} | self.covers

    def changed(self, name: str, tensor: Array, config: Any) -> Array:
        """The tensor as the file holds it."""
        for part, change in self.changes.items():
            if part in name:
                return change(tensor, config)
        return tensor


def architecture_for(config: Any) -> GgufArchitecture:
    """How GGUF describes networks of this configuration.

    Raises:
        BadInput: none is known here.
    """
    if (found := ARCHITECTURES.get(config.model_type)) is None:
        raise BadInput(
            f"output.save_model=gguf does not write models of the type {config.model_type}; it writes "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return found


def _paired(heads: str) -> Change:
    """Rows of a rotated projection: the two halves of each head's rows, one row of each in turn."""

    def change(tensor: Array, config: Any) -> Array:
        halves = tensor.reshape(getattr(config, heads), 2, -1, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)

    return change


def _of_each_kind(tensor: Array, config: Any) -> Array:
    """Rows of queries, keys and values: of each head in turn in the network, of each kind in turn in the file."""
    heads = tensor.reshape(config.n_head, 3, -1, *tensor.shape[1:])
    return heads.swapaxes(0, 1).reshape(tensor.shape)


def _plus_one(tensor: Array, config: Any) -> Array:
    return tensor + np.float32(1)


def _negative_exponential(tensor: Array, config: Any) -> Array:
    return -np.exp(tensor)


def _without_middle(tensor: Array, config: Any) -> Array:
    return tensor[:, 0]


def _flat(tensor: Array, config: Any) -> Array:
    return tensor[0]


def _first_half(tensor: Array, config: Any) -> Array:
    return tensor[:, : tensor.shape[1] // 2]


def _second_half(tensor: Array, config: Any) -> Array:
    return tensor[:, tensor.shape[1] // 2 :]


def _rope(config: Any) -> Mapping[str, Any]:
    """The settings of rotary embeddings, of global layers where those of others differ.

    Raises:
        BadInput: they are scaled in a way that files written here cannot say.
    """
    told = config.rope_parameters or {}
    told = told.get("full_attention", told)
    known = ("default", "llama3") if config.model_type in ("llama", "mistral") else ("default",)
    if (kind := told.get("rope_type", "default")) not in known:
        raise BadInput(
            f"output.save_model=gguf writes rotary embeddings of the type {' or '.join(known)}, and this "
            f"{config.model_type} has {kind}"
        )
    return told


def further_tensors(config: Any) -> dict[str, Array]:
    """Tensors of a file that stand for settings of the network."""
    told = getattr(config, "rope_parameters", None) or {}
    return {FREQUENCIES: llama3_divisors(told, _rotated(config))} if told.get("rope_type") == "llama3" else {}


def _theta(config: Any) -> Any:
    return _rope(config).get("rope_theta")


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _head_width_as_scaled(config: Any) -> int:
    """The width of heads, whose root llama.cpp divides attention by.

    Raises:
        BadInput: the network divides by another root, which a file cannot say.
    """
    if (divided := config.query_pre_attn_scalar) != (width := _head_width(config)):
        raise BadInput(
            f"output.save_model=gguf: {config.model_type} has query_pre_attn_scalar={divided}, which a GGUF file "
            f"cannot say; llama.cpp takes the width of a head, {width}"
        )
    return width


def _rotated(config: Any) -> int:
    return int(_head_width(config) * _rope(config).get("partial_rotary_factor", 1.0))


_COMMON: Settings = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
_ROTARY: Settings = {"rope.freq_base": _theta, "rope.dimension_count": _rotated}
_ROOT: Settings = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_WIDTHS: Settings = {
    "attention.key_length": _head_width,
    "attention.value_length": _head_width,
}
_SCALED_WIDTHS: Settings = {
    "attention.key_length": _head_width_as_scaled,
    "attention.value_length": _head_width_as_scaled,
}
_EXPERTS: Settings = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_IN_ROPE = frozenset({"rope_parameters", "head_dim", "partial_rotary_factor"})
_BANKS = {"ffn_gate_exps": _first_half, "ffn_up_exps": _second_half}

_LLAMA = GgufArchitecture(
    "llama",
    _COMMON | _ROTARY | _WIDTHS | _ROOT,
    {".attn_q.": _paired("num_attention_heads"), ".attn_k.": _paired("num_key_value_heads")},
    _IN_ROPE,
)

# By transformers' model type.
ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": GgufArchitecture("qwen2", _COMMON | _ROTARY | _ROOT, covers=_IN_ROPE),
    "qwen3": GgufArchitecture("qwen3", _COMMON | _ROTARY | _WIDTHS | _ROOT, covers=_IN_ROPE),
    "qwen2_moe": GgufArchitecture(
        "qwen2moe",
        _COMMON | _ROTARY | _ROOT | _EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        _BANKS | {"ffn_gate_inp_shexp": _flat},
        _IN_ROPE,
    ),
    "qwen3_moe": GgufArchitecture("qwen3moe", _COMMON | _ROTARY | _WIDTHS | _ROOT | _EXPERTS, _BANKS, _IN_ROPE),
    "stablelm": GgufArchitecture(
        "stablelm",
        _COMMON
        | _ROTARY
        | {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
        covers=_IN_ROPE | {"use_qkv_bias"},
    ),
    "starcoder2": GgufArchitecture(
        "starcoder2", _COMMON | _ROTARY | {"attention.layer_norm_epsilon": "norm_epsilon"}, covers=_IN_ROPE
    ),
    "nemotron": GgufArchitecture(
        "nemotron",
        _COMMON | _ROTARY | {"attention.layer_norm_epsilon": "norm_eps"},
        {"norm.weight": _plus_one},
        _IN_ROPE,
    ),
    "gemma2": GgufArchitecture(
        "gemma2",
        _COMMON
        | _ROTARY
        | _SCALED_WIDTHS
        | _ROOT
        | {
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        {"norm.weight": _plus_one},
        _IN_ROPE,
    ),
    "gemma3_text": GgufArchitecture(
        "gemma3",
        _COMMON | _ROTARY | _SCALED_WIDTHS | _ROOT | {"attention.sliding_window": "sliding_window"},
        {"norm.weight": _plus_one},
        _IN_ROPE,
    ),
    "gpt2": GgufArchitecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": lambda config: config.n_inner or 4 * config.n_embd,
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
        },
        covers=frozenset({"n_inner", "n_ctx"}),
    ),
    "bloom": GgufArchitecture(
        "bloom",
        {
            "context_length": lambda config: getattr(config, "seq_length", None) or config.hidden_size,
            "embedding_length": "hidden_size",
            "block_count": "n_layer",
            "feed_forward_length": lambda config: 4 * config.hidden_size,
            "attention.head_count": "n_head",
            "attention.head_count_kv": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
        },
        {"attn_qkv": _of_each_kind},
        frozenset({"seq_length"}),
    ),
    "mamba": GgufArchitecture(
        "mamba",
        {
            "context_length": lambda config: 1 << 20,  # it has no limit, and llama.cpp asks for one
            "embedding_length": "hidden_size",
            "block_count": "num_hidden_layers",
            "feed_forward_length": lambda config: 0,
            "attention.head_count": lambda config: 0,
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
            "ssm.conv_kernel": "conv_kernel",
            "ssm.inner_size": "intermediate_size",
            "ssm.state_size": "state_size",
            "ssm.time_step_rank": "time_step_rank",
            "vocab_size": "vocab_size",
        },
        {"ssm_a": _negative_exponential, "ssm_conv1d.weight": _without_middle},
        frozenset({"expand", "max_position_embeddings"}),
    ),
}
