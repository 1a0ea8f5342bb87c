"""Tiny networks of every architecture that is written as GGUF, with a tokenizer that GGUF describes."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from helpers.gguf_files import ARCHITECTURES, MERGES, TOKENS
from knowledge_compression.models import Model
from knowledge_compression.models.pretrained import auto_class

# What readers of files take for granted of an architecture, where a tiny network of transformers differs.
GRANTED: dict[str, dict[str, Any]] = {
    "qwen3moe": {"norm_topk_prob": True},
    "gemma2": {"head_dim": 256},
    "gemma3": {"head_dim": 256},
}
WRITTEN = ["llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "stablelm", "starcoder2", "nemotron", "gemma2", "gemma3"]
WRITTEN += ["gpt2", "bloom", "mamba"]


def byte_level(split: Any = None, *, template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(TOKENS)}, [tuple(m.split()) for m in MERGES]))
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS[:3]])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=TOKENS[0], bos_token=TOKENS[1], eos_token=TOKENS[2]
    )
    made.chat_template = template
    return made


def tiny(architecture: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
    """A tiny network with random weights, norms and biases."""
    model_type, settings = ARCHITECTURES.get(architecture, (architecture, {}))
    settings = settings | GRANTED.get(architecture, {}) | changes
    torch.manual_seed(len(architecture))
    network = auto_class(config := AutoConfig.for_model(model_type, **settings)).from_config(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Model(network, byte_level(), architecture)
