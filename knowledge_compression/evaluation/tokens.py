"""Texts to token ids, once for each tokenizer and set of texts, kept in the user's cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from knowledge_compression.cache import cached_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORTH_KEEPING = 200_000  # characters; less is tokenized again as fast as it is read


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special_tokens: bool | None = None
) -> list[list[int]]:
    """Token ids of each text.

    Args:
        tokenizer: any; fast ones take all texts at once.
        texts: what to encode.
        special_tokens: whether to add the tokenizer's special tokens; None does as the tokenizer is set.
    """
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or sum(map(len, texts)) < _WORTH_KEEPING:
        return _encode(tokenizer, texts, special_tokens)
    sha = hashlib.sha256(f"{special_tokens}\n{backend.to_str()}".encode())
    for text in texts:
        sha.update(f"{len(text)}:{text}".encode())

    def make(folder: Path) -> None:
        rows = _encode(tokenizer, texts, special_tokens)
        np.save(folder / "ids.npy", np.fromiter((token for row in rows for token in row), dtype=np.int32))
        np.save(folder / "ends.npy", np.cumsum([len(row) for row in rows]))

    folder = cached_folder(f"tokens/{sha.hexdigest()[:32]}", make)
    ids, ends = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("ids", "ends"))
    return [part.tolist() for part in np.split(ids, ends[:-1])]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_tokens: bool | None) -> list[list[int]]:
    options = {} if special_tokens is None else {"add_special_tokens": special_tokens}
    return tokenizer(list(texts), verbose=False, **options)["input_ids"]
