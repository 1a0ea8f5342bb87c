"""Scaled rotary embeddings in GGUF files, which transformers' tables for such files leave out."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowledge_compression.errors import BadInput

FREQUENCIES = "rope_freqs.weight"  # divisors of each pair's frequency, as in Llama 3.1
_LENGTHS = ("rope_factors_long.weight", "rope_factors_short.weight")
_GEMMAS = ("gemma3", "gemma3n", "gemma4")
_LENGTH = {"original_max_position_embeddings": 8192}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **_LENGTH}
_LLAMA4 = {"low_freq_factor": 1.0, "high_freq_factor": 1.0, **_LENGTH}
_UNROTATED = np.float32(1e30)  # a divisor that leaves nothing of a frequency
_PLAIN_SCALING = {"type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"}
_STATED = "yarn_attn_factor"  # OLMo 3's files state the usual one, 0.1 ln(factor) + 1
# Architectures in which YaRN scales attention scores too, and what llama.cpp's conversion multiplies the constant by.
_SCALED_SCORES = {"deepseek2": 0.1, "mistral3": 1.0}


def llama3_divisors(parameters: Mapping[str, Any], width: int) -> NDArray[np.float32]:
    """The divisors of Llama 3.1's frequencies: ``factor`` for long waves, 1 for short ones, a mean between these.

    Args:
        parameters: as in transformers' configurations of the type ``llama3``.
        width: rotated numbers of a head.

    Returns:
        float32 ``[width / 2]``.
    """
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    waves = 2 * math.pi * parameters["rope_theta"] ** (np.arange(0, width, 2) / width)
    turns = parameters["original_max_position_embeddings"] / waves  # length of the longest text before scaling
    share = ((turns - low) / (high - low)).clip(0, 1) if high > low else turns > low
    return (1 / ((1 - share) / factor + share)).astype(np.float32)


def proportional_divisors(parameters: Mapping[str, Any], width: int) -> NDArray[np.float32]:
    """The divisors of Gemma 4's frequencies: 1 for a share of them, and so much for the others that nothing is rotated.

    Args:
        parameters: as in transformers' configurations of the type ``proportional``.
        width: of a head.

    Returns:
        float32 ``[width / 2]``.
    """
    there = int(parameters.get("partial_rotary_factor", 1.0) * width // 2)
    return np.where(np.arange(width // 2) < there, np.float32(1), _UNROTATED)


def scaled_rope(
    architecture: str, stored: Mapping[str, Any], told: Mapping[str, Any], divisors: NDArray[np.float32] | None
) -> dict[str, Any]:
    """The setting ``rope_parameters`` of a file whose rotary embeddings are scaled; empty if they are not scaled.

    Args:
        architecture: the file's name for it.
        stored: the file's settings.
        told: the configuration that transformers derives from them.
        divisors: the tensor :data:`FREQUENCIES`, if the file has one.

    Raises:
        BadInput: they are scaled in a way that cannot be read.
    """
    prefix = f"{architecture}.rope.scaling."
    scaling = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    if _STATED in scaling and math.isclose(
        scaling[_STATED], 0.1 * math.log(scaling.get("factor", 1)) + 1, rel_tol=1e-5
    ):
        del scaling[_STATED]
    kind, theta = scaling.get("type", "none"), float(told.get("rope_theta", 10_000.0))
    windows = architecture == "olmo2" and told.get("sliding_window") is not None
    if divisors is not None:
        parameters = _of_divisors(architecture, theta, divisors)
    elif kind == "none":
        if architecture not in _GEMMAS and not windows:
            return {}
        parameters = {"rope_type": "default", "rope_theta": theta}
    elif kind not in ("linear", "yarn") or set(scaling) - _PLAIN_SCALING - (
        {"yarn_log_multiplier"} if architecture in _SCALED_SCORES else set()
    ):
        raise BadInput(
            f"its rotary embeddings are scaled by {', '.join(sorted(scaling))} ({kind}), which cannot be read"
        )
    else:
        parameters = {"rope_type": kind, "rope_theta": theta, "factor": float(scaling["factor"])}
        if kind == "yarn":
            parameters["original_max_position_embeddings"] = int(scaling["original_context_length"])
            parameters |= {
                name: float(scaling[f"yarn_{name}"]) for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in scaling
            }
        if "yarn_log_multiplier" in scaling:
            both = round(float(scaling["yarn_log_multiplier"]) / _SCALED_SCORES[architecture], 6)
            parameters |= {"mscale": both, "mscale_all_dim": both}
        if architecture == "gpt-oss":
            parameters["truncate"] = False
        if (growth := stored.get(f"{architecture}.attention.temperature_scale")) is not None:
            parameters["llama_4_scaling_beta"] = round(float(growth), 6)
    if architecture in _GEMMAS or windows:  # only global layers are scaled
        base = stored.get(f"{architecture}.rope.freq_base_swa", theta if windows else 10_000.0)
        local = {"rope_type": "default", "rope_theta": float(base)}
        return {"rope_parameters": {"full_attention": parameters, "sliding_attention": local}}
    return {"rope_parameters": parameters}


def _of_divisors(architecture: str, theta: float, divisors: NDArray[np.float32]) -> dict[str, Any]:
    """The parameters that give these divisors.

    Raises:
        BadInput: no known ones do.
    """
    if architecture == "gemma4":
        share = float((divisors < _UNROTATED).mean())
        return {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": share}
    factor = float(divisors.max())
    known = _LLAMA4 if architecture == "llama4" and {1.0, factor} == set(map(float, divisors)) else _LLAMA3
    parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **known}
    if not np.allclose(llama3_divisors(parameters, 2 * len(divisors)), divisors, rtol=1e-4):
        raise BadInput(f"its {FREQUENCIES} scale rotary embeddings differently from Llama 3.1")
    return parameters


def check_lengths(names: Collection[str]) -> None:
    """Refuse a file with one scaling for short texts and another for long ones, as in Phi 3.

    Raises:
        BadInput: the file has two scalings.
    """
    if found := [name for name in _LENGTHS if name in names]:
        raise BadInput(f"it holds {found[0]}: rotary embeddings that depend on the length of the text cannot be read")


def with_rope(
    architecture: str, stored: Mapping[str, Any], told: Mapping[str, Any], divisors: NDArray[np.float32] | None
) -> dict[str, Any]:
    """The attributes of a configuration, with ``rope_parameters`` instead of the separate attributes.

    Args:
        architecture, stored, told, divisors: as for :func:`scaled_rope`; ``told`` may hold ``rope_theta`` and
            ``partial_rotary_factor``.

    Raises:
        BadInput: they are scaled in a way that cannot be read.
    """
    rope = scaled_rope(architecture, stored, told, divisors)
    if "partial_rotary_factor" in told:
        parameters = rope.get("rope_parameters") or {"rope_type": "default"}
        if "rope_theta" in told:
            parameters = {"rope_theta": told["rope_theta"]} | parameters
        rope = {"rope_parameters": parameters | {"partial_rotary_factor": told["partial_rotary_factor"]}}
    return {name: told[name] for name in told if not rope or name not in ("rope_theta", "partial_rotary_factor")} | rope
