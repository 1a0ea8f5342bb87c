"""GGUF files of tiny networks with random weights, written by the library gguf."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from knowledge_compression.models.pretrained import auto_class

_WORDS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
TOKENS = ["<|pad|>", "<|s|>", "<|e|>", *_WORDS, *(a + b for a in _WORDS[:8] for b in _WORDS[:8])]
MERGES = [f"{a} {b}" for a in _WORDS[:8] for b in _WORDS[:8]]
TEMPLATE = "{{ raise_exception('a chat template was rendered') }}"

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"intermediate_size": 96, "max_position_embeddings": 64, "vocab_size": len(TOKENS)}
HEADS = {"head_dim": 16}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2}  # of the width that transformers has for files that name none

# Architectures as GGUF names them: what transformers calls them, and a tiny network's configuration.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", TINY | HEADS),
    "qwen2": ("qwen2", TINY),
    "qwen3": ("qwen3", TINY | {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen2moe": ("qwen2_moe", TINY | _EXPERTS),
    "qwen3moe": ("qwen3_moe", TINY | _EXPERTS | HEADS),
    "phi3": ("phi3", TINY | {"pad_token_id": 0}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": len(TOKENS)}),
    "starcoder2": ("starcoder2", TINY),
    "stablelm": ("stablelm", TINY),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": len(TOKENS)}),
    "falcon": (
        "falcon",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 1}
        | {"vocab_size": len(TOKENS)},
    ),
    "nemotron": ("nemotron", TINY),
    "gemma2": ("gemma2", TINY | HEADS),
    "gemma3": ("gemma3_text", TINY | HEADS),
    "mamba": (
        "mamba",
        {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4, "vocab_size": len(TOKENS)}
        | {"intermediate_size": 128, "conv_kernel": 4, "time_step_rank": 4},
    ),
    "t5": (
        "t5",
        {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
        | {"vocab_size": len(TOKENS), "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
    ),
}


def write(
    path: Path,
    architecture: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    settings: Mapping[str, Any] | None = None,
    further: Mapping[str, Any] | None = None,
    parts: int = 0,
    seed: int = 0,
) -> None:
    """A file of random weights, matrices stored as ``kind`` where their rows allow it.

    Args:
        path: where to; of a split file the first part, or any whose name gguf makes of it.
        architecture: a key of :data:`ARCHITECTURES`.
        kind: how matrices are stored: encoded where gguf can, random blocks otherwise.
        settings: of the network's configuration, beside the tiny ones.
        further: settings of the file as texts and floats, and tensors as arrays.
        parts: most tensors a part; 0 writes one file.
        seed: of the weights.
    """
    model_type, tiny = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(model_type, **(tiny | dict(settings or {})))
    with torch.device("meta"):
        network = auto_class(config).from_config(config)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(network, processor)
    writer = GGUFWriter(path, architecture, split_max_tensors=parts)
    writer.add_string("general.name", "tiny")
    writer.add_string("general.quantized_by", "gguf-py")
    for key, name in GGUF_CONFIG_MAPPING[_mapped(model_type)].items():
        value = None if name is None else getattr(config, name, None)
        if name == "rope_theta":
            value = (config.rope_parameters or {}).get("rope_theta")
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture}.{key}", value)
    for key, value in (further or {}).items():
        adds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        adds.get(type(value), writer.add_tensor)(key, value)
    _write_vocabulary(writer)
    rng, state = np.random.default_rng(seed), network.state_dict()
    for name, target in sorted(names.items()):
        if target not in state or (target == "lm_head.weight" and config.tie_word_embeddings):
            continue
        for stored, shape in _as_stored(architecture, name, tuple(state[target].shape)):
            values = rng.normal(0, 0.1, shape).astype(np.float32)
            if stored.endswith("ssm_a"):
                values = -np.abs(values) - 0.1
            _add(writer, rng, stored, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_blocks(
    rng: np.random.Generator, kind: GGMLQuantizationType, shape: tuple[int, ...]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes of a type, of which gguf makes finite numbers: scales in float16 have their highest bits cleared."""
    block, size = GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
    data[..., 1::2] &= 0xBB  # of no float16 at an even place are all bits of the exponent set
    return data


def _add(writer: GGUFWriter, rng: np.random.Generator, name: str, values: Any, kind: GGMLQuantizationType) -> None:
    from gguf import quantize

    block, _ = GGML_QUANT_SIZES[kind]
    if values.ndim < 2 or values.shape[-1] % block or kind == GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
        return
    try:
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    except NotImplementedError:
        writer.add_tensor(name, random_blocks(rng, kind, values.shape), raw_dtype=kind)


def _mapped(model_type: str) -> str:
    return {"gemma3_text": "gemma3"}.get(model_type, model_type)


def _as_stored(architecture: str, name: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the file of what becomes one weight of the network."""
    if "_exps" in name:
        half = shape if "down" in name else (shape[0], shape[1] // 2, shape[2])
        return [(name.removesuffix(".weight") + ".weight", half)]
    if architecture == "gpt2" and any(
        part in name for part in ("attn_qkv.w", "ffn_down.w", "ffn_up.w", "attn_output.w")
    ):
        return [(name, shape[::-1])]
    if architecture == "mamba" and "ssm_conv1d.weight" in name:
        return [(name, (shape[0], shape[2]))]
    if "ffn_gate_inp_shexp" in name:
        return [(name, shape[1:])]
    return [(name, shape)]


def _write_vocabulary(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
