"""Tokenization, done once for each tokenizer and set of texts and kept in the user's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knowledge_compression.cache import cached_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORTH_KEEPING = 200_000  # characters; tokenizing less is as fast as reading it from the cache


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    special_tokens: bool | None = None,
    most: int | None = None,
) -> list[list[int]]:
    """Token ids of each text.

    Args:
        tokenizer: any tokenizer; fast ones encode all texts in one call.
        texts: the texts to encode.
        special_tokens: whether to add the tokenizer's special tokens; None uses the tokenizer's default.
        most: maximum number of tokens of a text; None does not truncate.
    """
    options: dict[str, Any] = {} if special_tokens is None else {"add_special_tokens": special_tokens}
    if most is not None:
        options |= {"truncation": True, "max_length": most}
    if not texts:
        return []
    if sum(map(len, texts)) < _WORTH_KEEPING or (kind := _fingerprint(tokenizer)) is None:
        return _encode(tokenizer, texts, options)
    sha = hashlib.sha256(f"{sorted(options.items())}\n{kind}".encode())
    for text in texts:
        sha.update(f"{len(text)}:{text}".encode())

    def make(folder: Path) -> None:
        rows = _encode(tokenizer, texts, options)
        np.save(folder / "ids.npy", np.fromiter((token for row in rows for token in row), dtype=np.int32))
        np.save(folder / "ends.npy", np.cumsum([len(row) for row in rows]))

    folder = cached_folder(f"tokens/{sha.hexdigest()[:32]}", make)
    ids, ends = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("ids", "ends"))
    return [part.tolist() for part in np.split(ids, ends[:-1])]


@lru_cache(maxsize=4)  # serializing a tokenizer takes as long as encoding hundreds of sentences
def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of everything that decides a fast tokenizer's ids; None for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend.no_truncation()  # left by the last call; every call sets its own
    backend.no_padding()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], options: Mapping[str, Any]) -> list[list[int]]:
    unused = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(list(texts), **unused, **options)["input_ids"]
