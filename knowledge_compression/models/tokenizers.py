"""Whether two tokenizers read text in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words, numbers, spaces, line ends, signs, other scripts: where tokenizers with the same vocabulary still differ.
_TEXTS = (
    "The capital of France is Paris, isn't it?",
    " two  spaces\tand a tab\n\nand 12,345.67 lines\n",
    "def f(x): return x ** 2  # code",
    "Zürich, São Paulo, Київ, 東京, القاهرة, 🙂",
)


def read_alike(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether a few texts of different kinds give the same token ids."""
    return all(one(text)["input_ids"] == other(text)["input_ids"] for text in _TEXTS)
