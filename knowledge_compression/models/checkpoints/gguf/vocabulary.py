"""A tokenizer as GGUF describes it: vocabulary, merges, special tokens, and llama.cpp's name for how text is split.

Byte-level BPE (GGUF's ``gpt2``), BPE with bytes to fall back on (``llama``, as made from sentencepiece) and T5's
Unigram (``t5``) are written.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType

from knowledge_compression.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNREACHABLE = -1e4  # the score of a token that no merge produces
_ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer in GGUF's terms.

    Attributes:
        model: ``gpt2``, ``llama`` or ``t5``.
        split: llama.cpp's name for the way in which text is split before BPE; None if it is not split.
        tokens, types, scores: of each id; ``gpt2`` has no scores.
        merges: in their order.
        special: ids of special tokens, by their role.
        begins, ends: whether the first and last special token are added to a text.
        template: the chat template, which is copied as it is.
        characters: sentencepiece's table of characters that are replaced before a text is split; may be empty.
    """

    model: str
    split: str | None
    tokens: Sequence[str]
    types: Sequence[TokenType]
    scores: Sequence[float] | None
    merges: Sequence[str]
    special: Mapping[str, int]
    begins: bool
    ends: bool
    template: str | None
    characters: bytes = b""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, rows: int) -> GgufVocabulary:
        """The description of a tokenizer, padded to as many tokens as the embeddings have rows.

        Raises:
            BadInput: GGUF files cannot express the way in which it works.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise BadInput(
                "output.save_model=gguf writes tokenizers of the library tokenizers, and this model's "
                "tokenizer is of another kind"
            )
        told = json.loads(tokenizer.backend_tokenizer.to_str())
        model = told["model"]
        kind = _kind(told)
        texts = _texts(model)
        types = {i: TokenType.BYTE if _is_byte(text, kind) else TokenType.NORMAL for i, text in texts.items()}
        for added in told["added_tokens"]:
            texts[added["id"]] = added["content"]
            types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if kind != "gpt2" and (unknown := tokenizer.unk_token_id) is not None:
            types[unknown] = TokenType.UNKNOWN
        if (highest := max(texts)) >= rows:
            raise BadInput(f"its tokenizer has {highest + 1} tokens, but its embeddings have only {rows} rows")
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", ())]
        begins, ends = _frame(tokenizer)
        return cls(
            model=kind,
            split=_split(told) if kind == "gpt2" else None,
            tokens=[texts.get(i, f"[PAD{i}]") for i in range(rows)],
            types=[types.get(i, TokenType.UNUSED) for i in range(rows)],
            scores=_scores(kind, model, texts, merges, rows),
            merges=merges,
            special={role: found for role in _ROLES if (found := getattr(tokenizer, f"{role}_token_id")) is not None},
            begins=begins,
            ends=ends,
            template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
            characters=_characters(told["normalizer"]) if kind == "t5" else b"",
        )

    def write(self, writer: GGUFWriter) -> None:
        """Add the vocabulary to a file's settings."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split or "default")
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        if self.model == "t5":
            writer.add_add_space_prefix(True)
            writer.add_remove_extra_whitespaces(True)
            if self.characters:
                writer.add_precompiled_charsmap(self.characters)
        if self.template is not None:
            writer.add_chat_template(self.template)


def _kind(told: Mapping[str, Any]) -> str:
    kind = told["model"]["type"]
    if kind == "BPE" and told["model"].get("byte_fallback"):
        return "llama"
    if kind == "BPE" and any(step["type"] == "ByteLevel" for step in _steps(told["pre_tokenizer"])):
        return "gpt2"
    match [*_steps(told["pre_tokenizer"])]:
        case [{"type": "WhitespaceSplit"}, {"type": "Metaspace", "prepend_scheme": "always"}] if kind == "Unigram":
            return "t5"
    raise BadInput(
        f"output.save_model=gguf writes byte-level BPE, BPE with bytes to fall back on, and T5's Unigram, and this is "
        f"a {kind} tokenizer of another kind"
    )


def _texts(model: Mapping[str, Any]) -> dict[int, str]:
    if model["type"] == "Unigram":
        return {i: text for i, (text, _) in enumerate(model["vocab"])}
    return {i: text for text, i in model["vocab"].items()}


def _characters(normalizer: Mapping[str, Any] | None) -> bytes:
    """Sentencepiece's table of a normalizer.

    Raises:
        BadInput: it does something else.
    """
    match normalizer:
        case None:
            return b""
        case {"type": "Precompiled", "precompiled_charsmap": table}:
            return base64.b64decode(table)
    raise BadInput(
        f"output.save_model=gguf writes a Unigram tokenizer with sentencepiece's own table of characters, and this one "
        f"has the normalizer {normalizer['type']}"
    )


def _is_byte(text: str, kind: str) -> bool:
    return kind != "gpt2" and len(text) == len("<0x00>") and text.startswith("<0x") and text.endswith(">")


def _steps(stage: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """A pre-tokenizer, as the list of its steps."""
    if stage is None:
        return []
    inner = stage.get("pretokenizers")
    return [stage] if inner is None else [step for part in inner for step in _steps(part)]


def _split(told: Mapping[str, Any]) -> str:
    """llama.cpp's name for a byte-level tokenizer's way of splitting text.

    Raises:
        BadInput: it has none that is known here.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    names = {pattern: name for name, pattern in reversed(GGUF_PRE_TOKENIZER_SPLITS.items())}
    match [*_steps(told["pre_tokenizer"])]:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if pattern in names:
            return names[pattern]
    raise BadInput(
        "output.save_model=gguf has no name for the way in which this tokenizer splits text; it knows those of GPT-2, "
        f"SmolLM and {', '.join(sorted(set(names.values())))}"
    )


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a text begins with the first special token and ends with the last.

    Raises:
        BadInput: other tokens are added.
    """
    plain, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    first, last = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for begins, ends in ((False, False), (True, False), (False, True), (True, True)):
        if whole == (first if begins else []) + plain + (last if ends else []):
            return begins, ends
    raise BadInput(
        "its tokenizer adds other tokens to a text than its first and last special token, which GGUF files cannot "
        "express"
    )


def _scores(
    kind: str, model: Mapping[str, Any], texts: Mapping[int, str], merges: Sequence[str], rows: int
) -> list[float] | None:
    """A Unigram's own scores, or those by which sentencepiece merges in the order of BPE: the higher, the earlier."""
    if kind == "gpt2":
        return None
    if kind == "t5":
        own = [float(score) for _, score in model["vocab"]]
        return own + [_UNREACHABLE] * (rows - len(own))
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), place)
    return [-float(rank[texts[i]]) if texts.get(i) in rank else _UNREACHABLE for i in range(rows)]
