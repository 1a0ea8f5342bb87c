"""Tiny networks of many architectures, and what goes through them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
)

from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER, family_of

_WORDS = """
    the capital of is a an in and to was by france paris germany berlin italy rome spain madrid japan tokyo
    china beijing language french german italian animal dog cat bird fish wolf author book wrote born city country
    currency euro yen metal gold iron water moon sun red blue green one two three four five yes no not true false
"""
WORDS = _WORDS.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<extra_id_0>", "<extra_id_1>"]
VOCABULARY = len(SPECIAL) + len(WORDS) + 1 + 25  # words, the full stop, and a few ids no text uses

_AUTO = {ENCODER: AutoModelForMaskedLM, ENCODER_DECODER: AutoModelForSeq2SeqLM, DECODER: AutoModelForCausalLM}
_BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_LLAMA = _BERT | {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}
_IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}

# The configuration of a tiny network of each of them (two blocks, width 16).
TINY: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT | {"max_position_embeddings": 130},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "albert": _BERT | {"embedding_size": 8},
    "electra": _BERT | {"embedding_size": 8},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    | {"feed_forward_proj": "gated-gelu"},
    "bart": {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    | {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 128}
    | {"decoder_start_token_id": 3, "forced_eos_token_id": None},
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 16},
    "qwen2": _LLAMA,
    "gemma3_text": _LLAMA | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}
    | {"word_embed_proj_dim": 8, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "gpt_neox": _BERT | {"tie_word_embeddings": False},
}


# Mixtures of experts (two blocks, width 16, four experts of width 24, of which each token goes to two).
_MIXTURE = _LLAMA | {"tie_word_embeddings": False, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": _MIXTURE | {"num_local_experts": 4, "intermediate_size": 24, "sliding_window": None},
    "qwen3_moe": _MIXTURE | {"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "olmoe": _MIXTURE | {"num_experts": 4, "intermediate_size": 24},
    "gpt_oss": _MIXTURE
    | {"num_local_experts": 4, "intermediate_size": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "granitemoe": _MIXTURE | {"num_local_experts": 4, "intermediate_size": 24},
    "llama4_text": _MIXTURE
    | {"num_local_experts": 4, "intermediate_size": 24, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1},
}
FAMILY = {name: family_of(AutoConfig.for_model(name)) for name in TINY}


def tiny_config(architecture: str, **changes: Any) -> Any:
    """The tiny configuration of an architecture, with changes."""
    return AutoConfig.for_model(
        architecture, **({"vocab_size": VOCABULARY} | _IDS | (TINY | MIXTURES)[architecture] | changes)
    )


def build_network(architecture: str, **changes: Any) -> Any:
    """A tiny network with fixed random weights, its biases and norms random too so that no term is hidden by a zero."""
    torch.manual_seed(sum(map(ord, architecture)))
    config = tiny_config(architecture, **changes)
    network = _AUTO[family_of(config)].from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, BERT's special tokens, T5's sentinels; ``[CLS] text [SEP]`` when special tokens are asked for."""
    words = [*SPECIAL, *WORDS, "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        additional_special_tokens=["<extra_id_0>", "<extra_id_1>"],
    )


def lower_cased(model: Model) -> Model:
    """The model with a tokenizer that reads capital letters as small ones."""
    model.tokenizer = deepcopy(model.tokenizer)
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return model


def without_special_tokens(model: Model) -> Model:
    """The model with a tokenizer that adds nothing to a text, so that each text begins all that go on from it."""
    model.tokenizer = deepcopy(model.tokenizer)
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    return model


def model_inputs(model: Model, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids that ``model.network(**inputs)`` takes, decoder ids included for encoder-decoders."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIAL), VOCABULARY, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.family == ENCODER_DECODER:
        inputs["decoder_input_ids"] = torch.randint(len(SPECIAL), VOCABULARY, (batch, 5), generator=generator)
    return inputs


@torch.no_grad()
def logits_of(model: Model, **changes: Any) -> torch.Tensor:
    """Logits of the model for fixed random input."""
    return model.network(**model_inputs(model, **changes)).logits
