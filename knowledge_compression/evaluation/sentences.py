"""Answers compared by the likelihood of the whole sentence with each of them, for all three families.

Scores are those of BEAR's reference implementation (lm-pub-quiz 0.3.3): a decoder gives the log-likelihood of the
sentence after its beginning-of-text token; an encoder gives the pseudo log-likelihood, in which each token is predicted
while it and the rest of its word are masked (Kauf & Ivanova 2023, "A Better Way to Do Masked Language Model Scoring").
The reference does not score encoder-decoders; here the encoder reads the sentence with its answer left out, and the
decoder gives the log-likelihood of the answer.

Sentences of a relation share beginnings across answers, subjects and templates. A shared beginning is read once, and so
are equal masked sentences.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.cloze import MASK, Candidates, Cloze, candidate_scores, distributions, reader_of
from knowledge_compression.evaluation.scoring import Blank, Question
from knowledge_compression.models.families import DECODER, ENCODER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from knowledge_compression.evaluation.scoring import Scorer


@dataclass(frozen=True)
class Statement:
    """A sentence with a blank, and the answers that may complete it.

    Attributes:
        id: id of the item.
        sentence: contains one ``[MASK]``.
        answers: the answers to compare.
        gold: the right answer, if the distance to the dense model is measured: at each token of the sentence with this
            answer.
    """

    id: str
    sentence: str
    answers: Sequence[str]
    gold: str | None = None

    def completed(self) -> list[str]:
        """The sentence with each answer in its blank, capitalised as in the reference implementation."""
        whole = (self.sentence.replace(MASK, answer) for answer in self.answers)
        return [text[:1].upper() + text[1:] for text in whole]

    @property
    def right(self) -> Mapping[int, str]:
        """The index of the right answer, with the item's id; empty if none is given."""
        return {} if self.gold is None else {self.answers.index(self.gold): self.id}


def scores_of_answers(scorer: Scorer, statements: Sequence[Statement]) -> list[NDArray[np.float64] | None]:
    """The score of each answer of each statement, in nats.

    Args:
        scorer: scores with the model, of any family.
        statements: statements of one relation; the more of them share a beginning, the faster.

    Returns:
        ``[answers]`` for each statement; None if one of its sentences is longer than the model's maximum input.

    Raises:
        BadInput: the model cannot be asked in this way.
    """
    if scorer.model.family == DECODER:
        return _of_decoder(scorer, statements)
    if scorer.model.family == ENCODER:
        return _of_encoder(scorer, statements)
    return list(_of_encoder_decoder(scorer, statements))


def _of_decoder(scorer: Scorer, statements: Sequence[Statement]) -> list[NDArray[np.float64] | None]:
    tokenizer = scorer.model.tokenizer
    texts = [text for statement in statements for text in statement.completed()]
    rows = iter(sentences_after_opening(tokenizer, texts))
    limit = scorer.max_positions
    of_each = [[next(rows) for _ in statement.answers] for statement in statements]
    fits = [limit is None or max(map(len, ids)) <= limit for ids in of_each]
    asked = [ids for ids, there in zip(of_each, fits, strict=True) if there]
    about = [statement for statement, there in zip(statements, fits, strict=True) if there]
    if scorer.prompts.choosing is None:  # all in one question, so that shared beginnings are read once
        begin, whole = (asked[0][0][:1] if asked else []), [ids[1:] for of in asked for ids in of]
        starts = accumulate((len(of) for of in asked), initial=0)
        right = {start + i: item for start, one in zip(starts, about, strict=False) for i, item in one.right.items()}
        likelihoods = iter(scorer.log_likelihoods([Question(begin, whole, right=right)])[0])
        found = iter([np.array([next(likelihoods).log_prob for _ in of]) for of in asked])
    else:  # the text shared by all answers selects the prompt, so that an answer cannot select its own
        contexts = [_shared([ids[:-1] for ids in of]) for of in asked]
        questions = [
            Question(context, [ids[len(context) :] for ids in of], (one.id,), right=one.right)
            for context, of, one in zip(contexts, asked, about, strict=True)
        ]
        found = iter([np.array([one.log_prob for one in of]) for of in scorer.log_likelihoods(questions)])
    return [next(found) if there else None for there in fits]


def _shared(rows: Sequence[Sequence[int]]) -> list[int]:
    """The beginning that all rows share."""
    same = (column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
    return list(same)


def sentences_after_opening(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, after the token that begins a text and without special tokens behind it.

    The beginning is the tokenizer's BOS token. It is added by the tokenizer or, if the tokenizer does not add it even
    when set to, written before the text, as in the reference implementation. Without a BOS token the end-of-text token
    is used.
    """
    options: dict[str, Any] = {"return_special_tokens_mask": True, "return_attention_mask": False, "verbose": False}
    begin = tokenizer.bos_token or tokenizer.eos_token
    if begin is None:
        raise BadInput(f"the tokenizer {tokenizer.name_or_path} has no token that begins a text (bos_token, eos_token)")
    token = tokenizer.convert_tokens_to_ids(begin)
    if not texts:
        return []
    with _told_to_add_bos(tokenizer):
        batch = tokenizer(list(texts), **options)
        if not batch["input_ids"][0] or batch["input_ids"][0][0] != token:
            batch = tokenizer([begin + text for text in texts], **options)
    rows = []
    for ids, special in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True):
        start = ids.index(token)
        rows.append(
            [token, *(i for i, not_text in zip(ids[start + 1 :], special[start + 1 :], strict=True) if not not_text)]
        )
    return rows


@contextmanager
def _told_to_add_bos(tokenizer: Any) -> Iterator[None]:
    told = getattr(tokenizer, "add_bos_token", None)
    if told is None:
        yield
        return
    # Either assignment replaces the tokenizer's own special tokens around a text by those that the library derives.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    around = getattr(backend, "post_processor", None)
    tokenizer.add_bos_token = True
    try:
        yield
    finally:
        tokenizer.add_bos_token = told
        if backend is not None:
            backend.post_processor = around


def _of_encoder(scorer: Scorer, statements: Sequence[Statement]) -> list[NDArray[np.float64] | None]:
    model, tokenizer = scorer.model, scorer.model.tokenizer
    if tokenizer.mask_token_id is None or not tokenizer.is_fast:
        raise BadInput(
            f"the tokenizer of {model.name} has no mask token, or is a slow tokenizer, which does not mark words"
        )
    if scorer.prompts.choosing is not None:
        raise BadInput(
            "an encoder reads the answer with its sentence, so the answer would influence which prompt is selected "
            "(recovery=idp); choose recovery=prompt, prefix or lora"
        )
    texts = [text for statement in statements for text in statement.completed()]
    batch = tokenizer(texts, return_special_tokens_mask=True, verbose=False)
    of_text = np.repeat(np.arange(len(statements)), [len(statement.answers) for statement in statements])
    lengths = np.array([len(ids) for ids in batch["input_ids"]])
    limit = scorer.max_positions
    long = set(of_text[lengths > limit].tolist()) if limit is not None else set()
    starts = accumulate((len(statement.answers) for statement in statements), initial=0)
    right = {start + i: item for start, one in zip(starts, statements, strict=False) for i, item in one.right.items()}
    blanks: dict[tuple[tuple[int, ...], int, int], int] = {}
    gold: dict[tuple[tuple[int, ...], int, int], int] = {}  # the right token at a blank
    reads: list[list[tuple[int, int]]] = []  # for each blank: texts, and the token of each
    items: list[list[str]] = []  # for each blank: the items for which it is compared with the dense model
    for text, (ids, special) in enumerate(zip(batch["input_ids"], batch["special_tokens_mask"], strict=True)):
        if int(of_text[text]) in long:
            continue
        for place, masked in masked_by_word(ids, special, batch.word_ids(text), tokenizer.mask_token_id):
            key = (masked, place, 0)
            if text in right and gold.setdefault(key, ids[place]) != ids[place]:
                key = (masked, place, ids[place])  # the same sentence with another right answer is read again
                gold[key] = ids[place]
            at = blanks.setdefault(key, len(blanks))
            if at == len(reads):
                reads.append([])
                items.append([])
            reads[at].append((text, ids[place]))
            if text in right:
                items[at].append(right[text])
    scores = np.zeros(len(texts))
    asked = [Blank(k[0], k[1], items=tuple(of), gold=gold.get(k)) for k, of in zip(blanks, items, strict=True)]
    for part, log_probs in distributions(scorer, asked):
        rows, tokens, into = np.array([(r, token, text) for r, i in enumerate(part) for text, token in reads[i]]).T
        np.add.at(scores, into, log_probs[rows, tokens].double().cpu().numpy())
    ends = np.cumsum([len(statement.answers) for statement in statements])[:-1]
    return [None if i in long else part for i, part in enumerate(np.split(scores, ends))]


def masked_by_word(
    ids: Sequence[int], special: Sequence[int], words: Sequence[int | None], mask: int
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The inputs whose predictions make up a pseudo log-likelihood, one for each token that is not special.

    Args:
        ids: the sentence's tokens.
        special: for each token, whether the tokenizer added it.
        words: for each token, the word to which it belongs.
        mask: the mask token.

    Yields:
        The token's index, and the input in which it and the later tokens of its word are masked.
    """
    for place, added in enumerate(special):
        if added:
            continue
        end = place + 1
        while words[place] is not None and end < len(ids) and words[end] == words[place] and not special[end]:
            end += 1
        yield place, (*ids[:place], *[mask] * (end - place), *ids[end:])


def _of_encoder_decoder(scorer: Scorer, statements: Sequence[Statement]) -> Iterator[NDArray[np.float64] | None]:
    reader = reader_of(scorer)
    clozes = [Cloze(str(i), one.id, one.id, "", "", one.sentence, "") for i, one in enumerate(statements)]
    answers: Mapping[str, Sequence[str]] = {str(i): one.answers for i, one in enumerate(statements)}
    blanks = reader.blanks(clozes)
    there = [i for i, blank in enumerate(blanks) if blank is not None]
    asked = [clozes[i] for i in there]
    scores = iter(candidate_scores(reader, asked, [blanks[i] for i in there], Candidates(reader, answers)))
    for blank in blanks:
        yield None if blank is None else next(scores).numpy()
