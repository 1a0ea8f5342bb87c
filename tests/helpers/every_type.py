"""Tiny networks of the model types that people use first, each with a tokenizer of the kind that it is published with.

The tokenizers are trained here on the prompts of the atlas; the networks have random weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

import knowledge_compression.evaluation
from knowledge_compression.models.pretrained import auto_class

PIECES = 400  # of a vocabulary

# What makes a network tiny, where its configuration has the value. No two sizes of a network are equal.
_SMALL: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "embedding_size": 32,
    "intermediate_size": 48, "ffn_hidden_size": 48, "d_ff": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "shared_intermediate_size": 40,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "num_decoder_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "num_heads": 4, "n_head": 4, "n_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256,
}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_ALTERNATING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA_PART = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2,
} | _ALTERNATING  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


class Tiny(NamedTuple):
    """How a type is made small.

    Attributes:
        tokenizer: the kind of its tokenizer, one of :data:`TOKENIZERS`.
        config: what its configuration needs beside :data:`_SMALL`.
        without: targets of which it has no layers.
    """

    tokenizer: str
    config: Mapping[str, Any] = {}
    without: tuple[str, ...] = ()


DECODERS: dict[str, Tiny] = {
    "llama": Tiny("llama"),
    "mistral": Tiny("llama", {"sliding_window": 16}),
    "ministral3": Tiny("llama"),
    "mixtral": Tiny("llama"),
    "qwen2": Tiny("bytes"),
    "qwen2_moe": Tiny("bytes"),
    "qwen3": Tiny("bytes"),
    "qwen3_moe": Tiny("bytes"),
    "qwen3_next": Tiny("bytes", _DELTA),
    "qwen3_5_text": Tiny("bytes", _DELTA),
    "qwen3_5_moe_text": Tiny("bytes", _DELTA),
    "gemma": Tiny("llama"),
    "gemma2": Tiny("llama", _ALTERNATING),
    "gemma3_text": Tiny("llama", _ALTERNATING),
    "gemma3": Tiny("llama", {"text_config": _GEMMA_PART, "vision_config": _VISION, "mm_tokens_per_image": 4}),
    "gemma4_text": Tiny("llama", _ALTERNATING | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512}),
    "modernbert-decoder": Tiny("bytes", {"local_attention": 16, "layer_types": _ALTERNATING["layer_types"]}),
    "phi": Tiny("bytes_unpadded"),
    "phi3": Tiny("llama"),
    "phimoe": Tiny("llama"),
    "olmo": Tiny("bytes"),
    "olmo2": Tiny("bytes"),
    "olmo3": Tiny("bytes", _ALTERNATING),
    "olmoe": Tiny("bytes"),
    "granite": Tiny("bytes"),
    "granitemoe": Tiny("bytes"),
    "granitemoehybrid": Tiny("bytes", _MAMBA2 | {"layer_types": ["mamba", "attention"]}),
    "falcon": Tiny("bytes_unpadded", {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon_h1": Tiny("bytes", _MAMBA2 | {"mamba_d_ssm": 64}),
    "smollm3": Tiny("bytes_begun"),
    "starcoder2": Tiny("bytes_unpadded", {"sliding_window": 16}),
    "stablelm": Tiny("bytes"),
    "cohere": Tiny("bytes_begun"),
    "cohere2": Tiny("bytes_begun", _ALTERNATING),
    "glm": Tiny("bytes"),
    "glm4": Tiny("bytes"),
    "glm4_moe": Tiny("bytes", {"first_k_dense_replace": 1}),
    "deepseek_v2": Tiny("bytes_begun", _LATENT | {"num_key_value_heads": 4, "first_k_dense_replace": 1}),
    "deepseek_v3": Tiny(
        "bytes_begun", _LATENT | {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
    ),
    "deepseek_v4": Tiny(
        "bytes_begun",
        {"num_hidden_layers": 3, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 24, "o_lora_rank": 16}
        | {"o_groups": 2, "index_n_heads": 2, "index_head_dim": 16},
    ),
    "gpt_oss": Tiny("bytes", _ALTERNATING),
    "gptj": Tiny("bytes_unpadded", {"rotary_dim": 4}),
    "gpt_neo": Tiny("bytes_unpadded", {"attention_types": [[["global", "local"], 1]], "window_size": 16}),
    "gpt_bigcode": Tiny("bytes_unpadded"),
    "bloom": Tiny("bytes"),
    "mpt": Tiny("bytes_unpadded"),
    "codegen": Tiny("bytes_unpadded", {"rotary_dim": 4, "n_ctx": 256}),
    "exaone4": Tiny("bytes", _ALTERNATING),
    "nemotron": Tiny("llama"),
    "mamba": Tiny("bytes", {"state_size": 8, "time_step_rank": 8}, ("att", "ff")),
    "mamba2": Tiny(
        "bytes", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16}, ("att", "ff")
    ),
    "jamba": Tiny(
        "llama",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8}
        | {"use_mamba_kernels": False},
    ),
    "bamba": Tiny("bytes", _MAMBA2 | {"attn_layer_indices": [1]}),
    "zamba": Tiny(
        "llama",
        {"num_hidden_layers": 5, "layer_types": ["mamba", "hybrid", "mamba", "hybrid", "mamba"]}
        | {"n_mamba_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False}
        | {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
    ),
    "zamba2": Tiny(  # its second and fourth block share their attention and feed-forward layers, as Zamba's do
        "llama",
        {"num_hidden_layers": 5, "hybrid_layer_ids": [1, 3], "num_mem_blocks": 1, "use_shared_attention_adapter": True}
        | {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "mamba"]}
        | {"n_mamba_heads": 4, "mamba_headdim": 16, "mamba_d_state": 8, "chunk_size": 16, "adapter_rank": 8}
        | {"use_mamba_kernels": False, "attention_head_dim": 16, "num_key_value_heads": 4},
    ),
    "recurrent_gemma": Tiny(
        "llama", {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "num_key_value_heads": 1}
    ),
    "lfm2": Tiny("bytes_begun", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "apertus": Tiny("bytes_begun"),
    "ernie4_5": Tiny("llama"),
    "llama4_text": Tiny("bytes_begun", {"intermediate_size_mlp": 40, "attention_chunk_size": 16}),
    "opt": Tiny("bytes_begun", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt2": Tiny("bytes_unpadded"),
    "gpt_neox": Tiny("bytes_unpadded"),
}
ENCODERS: dict[str, Tiny] = {
    "bert": Tiny("wordpiece"),
    "roberta": Tiny("bytes_masked"),
    "distilbert": Tiny("wordpiece", {"dim": 32, "hidden_dim": 48}),
    "albert": Tiny("pieces_masked", {"embedding_size": 16}),
    "electra": Tiny("wordpiece", {"embedding_size": 16}),
    "modernbert": Tiny("bytes_masked", {"local_attention": 16, "layer_types": _ALTERNATING["layer_types"]}),
    "deberta-v2": Tiny("pieces_masked", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "xlm-roberta": Tiny("pieces_masked"),
    "camembert": Tiny("pieces_masked"),
    "eurobert": Tiny("bytes_masked"),
    "mpnet": Tiny("wordpiece"),
    "roformer": Tiny("wordpiece"),
    "rembert": Tiny("pieces_masked", {"input_embedding_size": 16, "output_embedding_size": 24}),
    "megatron-bert": Tiny("wordpiece"),
    "big_bird": Tiny("pieces_masked", {"block_size": 4, "num_random_blocks": 1}),
}
_GEMMA_PAIR = {"encoder": _GEMMA_PART, "decoder": _GEMMA_PART | {"cross_attention_hidden_size": 32}}
ENCODER_DECODERS: dict[str, Tiny] = {
    "t5": Tiny("pieces_ended", {"decoder_start_token_id": 0}),
    "mt5": Tiny("pieces_ended"),
    "umt5": Tiny("pieces_ended"),
    "longt5": Tiny("pieces_ended", {"decoder_start_token_id": 0, "local_radius": 7}),
    "switch_transformers": Tiny(
        "pieces_ended",
        {"decoder_start_token_id": 0, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    "t5gemma": Tiny("llama", _GEMMA_PAIR | {"decoder_start_token_id": 2}),
    "t5gemma2": Tiny(
        "llama",
        {
            "encoder": {"text_config": _GEMMA_PART, "vision_config": _VISION, "mm_tokens_per_image": 4},
            "decoder": _GEMMA_PART,
            "decoder_start_token_id": 2,
        },
    ),
    "bart": Tiny("bytes_masked", {"decoder_start_token_id": 3, "forced_eos_token_id": None}),
    "mbart": Tiny("pieces_ended", {"decoder_start_token_id": 3, "forced_eos_token_id": None}),
    "pegasus": Tiny("pieces_ended", {"forced_eos_token_id": None}),
    "marian": Tiny("pieces_ended", {"decoder_start_token_id": 0, "decoder_vocab_size": 512}),
    "m2m_100": Tiny("pieces_ended", {"decoder_start_token_id": 3}),
    "led": Tiny(
        "bytes_masked",
        {"decoder_start_token_id": 3, "attention_window": 8, "max_encoder_position_embeddings": 256}
        | {"max_decoder_position_embeddings": 256},
    ),
    "blenderbot": Tiny("bytes", {"decoder_start_token_id": 2, "forced_eos_token_id": None}),
}
TYPES: dict[str, Tiny] = DECODERS | ENCODERS | ENCODER_DECODERS
# Further types whose files mlx-lm changes; the last two with parts for pictures.
CONVERTED: dict[str, Tiny] = {
    "dots1": Tiny("bytes", {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}),
    "helium": Tiny("llama"),
    "hunyuan_v1_dense": Tiny("bytes"),
    "seed_oss": Tiny("bytes"),
    "gemma4": Tiny(
        "llama",
        {
            "text_config": _GEMMA_PART
            | {"hidden_size": 64, "head_dim": 16, "global_head_dim": 16, "intermediate_size": 96}
            | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512},
            "vision_config": _VISION | {"num_key_value_heads": 2, "head_dim": 8},
            "audio_config": None,
        },
    ),
    "qwen3_5": Tiny(
        "bytes",
        {
            "text_config": _DELTA
            | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "full_attention_interval": 2}
            | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
            "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
            | {"out_hidden_size": 64, "patch_size": 8},
        },
    ),
}


def write_tiny(model_type: str, folder: Path, whole: type | None = None, **sizes: Any) -> None:
    """Save a tiny network of a type and its tokenizer, as anybody saves them.

    Args:
        model_type: one of :data:`TYPES` or :data:`CONVERTED`.
        folder: where to.
        whole: the auto class of networks with all their parts; by default that of their text part.
        **sizes: settings of the configuration that are other than those of the type.
    """
    torch.manual_seed(0)
    tiny = (TYPES | CONVERTED)[model_type]
    tokenizer = make(tiny.tokenizer)
    config = _config(model_type, tiny._replace(config={**tiny.config, **sizes}), tokenizer)
    network = (whole or auto_class(config)).from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # so that no term is hidden by a zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _config(model_type: str, tiny: Tiny, tokenizer: PreTrainedTokenizerFast) -> Any:
    there = AutoConfig.for_model(model_type)
    values = there.to_dict()
    small = {name: size for name, size in _SMALL.items() if name in values}
    rows = 512  # more than the tokenizer has, as published embeddings do
    ids = {
        name: getattr(tokenizer, name)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        if getattr(tokenizer, name) is not None
    }
    return AutoConfig.for_model(model_type, **{"vocab_size": rows} | small | ids | tiny.config)


@cache
def sentences() -> tuple[str, ...]:
    """Prompts of the atlas with their answers, one a fact."""
    folder = Path(knowledge_compression.evaluation.__file__).parent / "atlas_facts"
    texts = []
    for path in sorted(folder.glob("*.jsonl")):
        facts = [json.loads(line) for line in path.read_text().splitlines()]
        texts += [" ".join(str(value) for value in fact.values() if isinstance(value, str)) for fact in facts]
    return tuple(texts)


@cache
def make(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind, trained on :func:`sentences`."""
    return TOKENIZERS[kind]()


def _bytes(bos: bool = False, padded: bool = True, masked: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's byte-level pairs; ``masked`` as RoBERTa has them."""
    special = ["<pad>", "<unk>", "<s>", "</s>", *(["<mask>"] if masked else [])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        sentences(),
        trainers.BpeTrainer(
            vocab_size=PIECES,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _wrapped(tokenizer, bos or masked, ended=masked, padded=padded, masked=masked)


def _llama() -> PreTrainedTokenizerFast:
    """SentencePiece's pairs with bytes to fall back on, begun by ``<s>``, as LLaMA, Mistral and Gemma have them."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    spelt = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words = [text.split(" ") for text in sentences()]
    tokenizer.train_from_iterator(
        [word for text in words for word in text],  # a normalizer alone would let pieces reach over words
        trainers.BpeTrainer(vocab_size=PIECES, special_tokens=[*special, *spelt], show_progress=False),
    )
    return _wrapped(tokenizer, True)


def _pieces(masked: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece's unigrams: ended as T5 has them, or ``masked`` and framed as XLM-RoBERTa has them."""
    special = ["<pad>", "</s>", "<unk>", "<s>", *(["<mask>"] if masked else ["<extra_id_1>", "<extra_id_0>"])]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        sentences(),
        trainers.UnigramTrainer(vocab_size=PIECES, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    return _wrapped(tokenizer, masked, ended=True, masked=masked)


def _wordpiece() -> PreTrainedTokenizerFast:
    """BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        sentences(), trainers.WordPieceTrainer(vocab_size=PIECES, special_tokens=special, show_progress=False)
    )
    frame = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.post_processor = frame
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _wrapped(
    tokenizer: Tokenizer, bos: bool, *, ended: bool = False, padded: bool = True, masked: bool = False
) -> PreTrainedTokenizerFast:
    begin, end = ("<s> " if bos else ""), (" </s>" if ended else "")
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{begin}$A{end}", f"{begin}$A{end} $B{end}", special_tokens=ids
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    names |= {"pad_token": "<pad>"} if padded else {}
    names |= {"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"} if masked else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


TOKENIZERS: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": _bytes,
    "bytes_begun": lambda: _bytes(bos=True),
    "bytes_unpadded": lambda: _bytes(padded=False),
    "bytes_masked": lambda: _bytes(masked=True),
    "llama": _llama,
    "pieces_ended": _pieces,
    "pieces_masked": lambda: _pieces(masked=True),
    "wordpiece": _wordpiece,
}
