"""Whether a GGUF file says everything on which a network's answers depend."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from transformers import AutoConfig, PretrainedConfig, masking_utils
from transformers import modeling_rope_utils as rope_utils

from knowledge_compression.errors import BadInput

# Attributes of a configuration on which no answer depends, or that follow from the file's vocabulary.
_NO_MATTER = {
    *(
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "dtype",
        "model_type",
        "tie_word_embeddings",
        "transformers_version",
    ),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "use_cache", "initializer_range"),
    *(
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "initializer_std",
        "pretraining_tp",
        "slow_but_exact",
        "router_aux_loss_coef",
        "output_router_logits",
    ),
    *("time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme"),
    *("cache_implementation", "rescale_prenorm_residual", "residual_in_fp32", "use_mambapy", "max_window_layers"),
}
# Parts of settings of rotary embeddings: in a text all positions of a token are equal; "type" repeats "rope_type";
# attention_factor was found to be the usual one.
_NO_MATTER_INSIDE = (
    *("mrope_section", "mrope_interleaved", "type", "attention_factor", "max_position_embeddings"),
    *("moe_jitter_eps", "moe_loss_weight"),  # of training
)
_NO_MATTER_ANYWHERE = ("drop", "pdrop", "summary_")


def check_expressed(network: Any, told: PretrainedConfig, covered: Collection[str]) -> None:
    """Refuse a network that a reader of its file would build differently.

    Args:
        network: the network to be written.
        told: the configuration that a reader makes of the file's settings.
        covered: attributes that the file expresses in another way.

    Raises:
        BadInput: a setting has no place in the file and is not the one that readers take for granted.
    """
    there, strange = told.to_dict(), _strange(network)
    for name, value in network.config.to_dict().items():
        if name in strange or not _matters(name) or name in covered:
            continue
        if not _alike(value, there.get(name)):
            full, here, assumed = _difference(name, value, there.get(name))
            raise BadInput(
                f"output.save_model=gguf: {network.config.model_type} has {full}={here}, which a GGUF file cannot "
                f"express; its readers assume {assumed}"
            )


def _difference(name: str, value: Any, other: Any) -> tuple[str, Any, Any]:
    """The one entry in which two configurations inside others differ, with its full name; themselves otherwise."""
    if isinstance(value, Mapping) and isinstance(other, Mapping) and value.keys() == other.keys():
        apart = [part for part in value if _matters_inside(part, value[part]) and not _alike(value[part], other[part])]
        if len(apart) == 1:
            return _difference(f"{name}.{apart[0]}", value[apart[0]], other[apart[0]])
    return name, value, other


def _matters(name: str) -> bool:
    return name not in _NO_MATTER and not any(part in name for part in _NO_MATTER_ANYWHERE)


def _matters_inside(name: Any, value: Any) -> bool:
    whole = name == "partial_rotary_factor" and value == 1.0
    return _matters(str(name)) and name not in _NO_MATTER_INSIDE and not whole


def _strange(network: Any) -> set[str]:
    """Entries of a configuration that its class does not declare, and that no code of the network mentions.

    Published configurations have many: settings of their training, or of programs of their authors.
    """
    kind = network.config.model_type
    further = network.config.to_dict().keys() - AutoConfig.for_model(kind).to_dict().keys()
    modules = {sys.modules[type(module).__module__] for module in network.modules()} | {masking_utils, rope_utils}
    code = "\n".join(inspect.getsource(module) for module in modules if module.__name__.startswith("transformers."))
    return {name for name in further if not re.search(rf"\b{re.escape(name)}\b", code)}


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        one, other = ({name: part for name, part in of.items() if _matters_inside(name, part)} for of in (one, other))
        return one.keys() == other.keys() and all(_alike(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_alike(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, int | float):
        return bool(np.isclose(one, other, rtol=1e-6))
    return bool(one == other)
