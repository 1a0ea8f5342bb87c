"""Perplexity of running text: documents joined, cut into fixed windows, each scored on its own."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from knowledge_compression.corpora.c4 import C4
from knowledge_compression.corpora.corpus import (
    AUTO,
    TEST,
    VALIDATION,
    Documents,
    PublishedCorpus,
    beginning,
    check_bos,
)
from knowledge_compression.corpora.wikitext import WikiText
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring import Blank, Question
from knowledge_compression.evaluation.suite import Evaluation, item_table
from knowledge_compression.heavy import pl, torch
from knowledge_compression.identity import PLACE
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER, ENCODER, ENCODER_DECODER

if TYPE_CHECKING:
    from torch import LongTensor

    from knowledge_compression.evaluation.scoring import Scorer

# The split of each corpus: GPTQ and SparseGPT report WikiText-2's test text and C4's validation shard.
_TEXTS: Mapping[str, tuple[Callable[..., PublishedCorpus], str]] = {
    "wikitext": (WikiText, TEST),
    "c4": (C4, VALIDATION),
}
# How documents are joined into one text. ``text``: as in the corpus (the rows of WikiText-2 are its lines, blank ones
# emptied; pages of C4 are separated by an empty line). ``gptq``: as in the published scripts of GPTQ and SparseGPT.
_JOINS: Mapping[tuple[str, str], Callable[[Sequence[str]], str]] = {
    ("wikitext", "text"): lambda lines: "".join(line or " \n" for line in lines),
    ("wikitext", "gptq"): "\n\n".join,
    ("c4", "text"): "\n\n".join,
    ("c4", "gptq"): lambda pages: " ".join(pages[:1100]),
}
JOINS = ("text", "gptq")
_LARGEST = math.log(sys.float_info.max)  # nats; a larger loss has a perplexity beyond the range of a float


@dataclass(frozen=True)
class Perplexity:
    """Perplexity in fixed windows, as GPTQ and SparseGPT report it; pseudo-perplexity for encoders.

    The text is tokenized once without special tokens and cut into disjoint windows; the remainder at the end is
    dropped. Decoders are scored on every token of a window except its first. Encoders predict each token from the rest
    of its window with that token masked [Salazar et al., 2020, eq. 1], between the tokenizer's own special tokens.
    Encoder-decoders read the first half of a window and are scored on the second.

    Attributes:
        corpus: ``wikitext`` (WikiText-2 raw, test) or ``c4`` (validation).
        join: ``text`` (as in the corpus) or ``gptq`` (with the separators of the scripts of GPTQ and SparseGPT, for
            comparison with published figures).
        window: tokens in a window; at most the model's positions.
        limit: use N evenly spaced windows, the i-th being window ``floor(i * windows / N)``; None uses all.
        bos: decoders only: whether each window is preceded by the tokenizer's beginning-of-text token. ``auto`` does
            what the tokenizer does at the beginning of a text (Gemma's and LLaMA's add the token, GPT-2's and Qwen's do
            not), except that ``join=gptq`` omits it, as the published scripts do. The same tokens are scored either
            way.
        masked_per_window: encoders only: mask N evenly spaced positions of each window; None masks every position in
            turn.
        data_dir: local files instead of the hub.
    """

    corpus: str = "wikitext"
    join: str = "text"
    window: int = 2048
    limit: int | None = None
    bos: bool | str = AUTO
    masked_per_window: int | None = None
    data_dir: str | None = field(default=None, metadata=PLACE)

    def __post_init__(self) -> None:
        """Refuse invalid settings."""
        for option, known in (("corpus", tuple(_TEXTS)), ("join", JOINS)):
            if getattr(self, option) not in known:
                raise BadInput(
                    f"eval.perplexity.{option}={getattr(self, option)} does not exist; choose one of {', '.join(known)}"
                )
        check_bos(self.bos, "eval.perplexity.bos")
        for option, least in (("window", 2), ("limit", 1), ("masked_per_window", 1)):
            value = getattr(self, option)
            if (value is not None or option == "window") and (not isinstance(value, int) or value < least):
                raise BadInput(f"eval.perplexity.{option}={value} is not a whole number from {least} on")

    def fingerprint(self) -> str:
        """Digest of the text, or its id on the hub."""
        return (
            self._source().fingerprint()
            if self.data_dir is None
            else hashlib.sha256(self.text().encode()).hexdigest()[:16]
        )

    def check_data(self) -> None:
        """Refuse a text that is not available."""
        self._source().check_data(_TEXTS[self.corpus][1])

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Score the text.

        Raises:
            BadInput: the text is shorter than one window.
            DataUnavailable: the text cannot be obtained.
        """
        begin = self.begin(scorer.model)
        windows, total = self.windows(scorer)
        ids = [f"{windows.shape[1]}:{place}" for place in self._places(total)]
        if scorer.model.family == ENCODER:
            scored = _score_encoder(scorer, windows, ids, self.masked_per_window)
        else:
            scored = _continuations(scorer, windows, ids, begin)
        rows = [
            {
                "suite": "perplexity",
                "task": self.corpus,
                "id": name,
                "log_prob": log_prob,
                "tokens": tokens,
                "nll": -log_prob / tokens,
            }
            for name, (log_prob, tokens) in zip(ids, scored, strict=True)
        ]
        items = item_table(rows, {"tokens": pl.Int64(), "nll": pl.Float64()})
        return Evaluation(_metrics(items["nll"]), items, self._description(scorer.model, windows, total))

    def begin(self, model: Model) -> list[int]:
        """The tokens before each window of a decoder: the beginning-of-text token, or none.

        Raises:
            BadInput: it is required and the tokenizer has none, or the model is not a decoder.
        """
        bos = False if self.bos == AUTO and self.join == "gptq" else self.bos
        return beginning(model, bos, "eval.perplexity.bos")

    def windows(self, scorer: Scorer) -> tuple[LongTensor, int]:
        """The windows to score, int64 ``[N, window]``, and the number of windows in the text.

        Raises:
            BadInput: the text is shorter than one window.
        """
        model = scorer.model
        encoder = model.family == ENCODER
        special = model.tokenizer.num_special_tokens_to_add() if encoder else len(self.begin(model))
        length = min(self.window, (scorer.max_positions or self.window) - special)
        stream = Documents(self.corpus, [self.text()]).stream(model)
        total = len(stream) // length
        if total == 0:
            raise BadInput(
                f"eval.perplexity.window={self.window}: the text of {self.corpus} has only {len(stream)} tokens; "
                f"choose a window of {len(stream)} or less"
            )
        whole = stream[: total * length].view(total, length)
        return whole[self._places(total)], total  # type: ignore[return-value]

    def _source(self) -> PublishedCorpus:
        return _TEXTS[self.corpus][0](data_dir=self.data_dir)

    def text(self) -> str:
        """The whole text, its documents joined as set by ``join``."""
        documents = self._source().documents(_TEXTS[self.corpus][1])
        return _JOINS[self.corpus, self.join](documents.texts)

    def _places(self, total: int) -> list[int]:
        count = min(self.limit or total, total)
        return [i * total // count for i in range(count)]

    def _description(self, model: Model, windows: LongTensor, total: int) -> dict[str, Any]:
        return {
            "corpus": self.corpus,
            "join": self.join,
            "split": _TEXTS[self.corpus][1],
            "fingerprint": self.fingerprint(),
            "window": windows.shape[1],
            "windows": len(windows),
            "of": total,
            "protocol": _PROTOCOL[model.family],
            **({"masked_per_window": self.masked_per_window} if model.family == ENCODER else {}),
            **({"bos": bool(self.begin(model))} if model.family == DECODER else {}),
        }


_PROTOCOL = {
    DECODER: "every token of a window but its first, from those before it",
    ENCODER: "pseudo-perplexity: each token from the rest of its window, with that token masked",
    ENCODER_DECODER: "the second half of a window, from its first half and the tokens before",
}

Scored = list[tuple[float, int]]  # the log-probability of the scored tokens of each window, and their number


def _continuations(scorer: Scorer, windows: LongTensor, ids: Sequence[str], begin: list[int]) -> Scored:
    """Score all tokens but the first for decoders, after ``begin``; the second half for encoder-decoders."""
    read = 1 if scorer.model.family == DECODER else windows.shape[1] // 2
    rows = zip(windows.tolist(), ids, strict=True)
    questions = [Question([*begin, *row[:read]], [row[read:]], (name,), gold=0) for row, name in rows]
    return [(answer.log_prob, windows.shape[1] - read) for (answer,) in scorer.log_likelihoods(questions)]


def _score_encoder(scorer: Scorer, windows: LongTensor, names: Sequence[str], masked: int | None) -> Scored:
    tokenizer = scorer.model.tokenizer
    if tokenizer.mask_token_id is None:
        raise BadInput(
            f"eval=perplexity masks each token for an encoder in turn, and the tokenizer of {scorer.model.name} has no "
            "mask token; use the tokenizer that it was trained with"
        )
    length = windows.shape[1]
    count = min(masked or length, length)
    places = [i * length // count for i in range(count)]
    before, after = _frame(tokenizer)
    blanks, gold = [], []
    for row, name in zip(windows.tolist(), names, strict=True):
        for place in places:
            ids = [*before, *row, *after]
            gold.append(row[place])
            ids[len(before) + place] = tokenizer.mask_token_id
            blanks.append(Blank(ids, position=len(before) + place, items=(name,), gold=row[place]))
    log_probs = torch.zeros(len(blanks), dtype=torch.float64)
    for indices, distributions in scorer.distributions(blanks):
        wanted = torch.tensor([gold[i] for i in indices], device=distributions.device)
        log_probs[indices] = distributions.gather(-1, wanted[:, None])[:, 0].double().cpu()
    return [(float(total), count) for total in log_probs.view(len(windows), count).sum(-1)]


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer adds before and after a text."""
    empty, some = tokenizer("")["input_ids"], tokenizer(tokenizer.mask_token)["input_ids"]
    before = next((i for i, (a, b) in enumerate(zip(empty, some, strict=False)) if a != b), len(empty))
    return empty[:before], empty[before:]


def _metrics(nll: pl.Series) -> dict[str, float]:
    """Perplexity, nats per token, and the standard errors of both over windows (of perplexity by the delta method).

    A perplexity too large for a float is infinite.
    """
    mean = float(nll.mean())  # type: ignore[arg-type]
    perplexity = math.exp(mean) if mean < _LARGEST else math.inf if mean > 0 else math.nan
    metrics = {"perplexity": perplexity, "nats_per_token": mean, "windows": float(len(nll))}
    if len(nll) > 1:
        error = float(nll.std()) / math.sqrt(len(nll))  # type: ignore[arg-type]
        metrics |= {"nats_per_token_stderr": error, "perplexity_stderr": metrics["perplexity"] * error}
    return metrics
