"""Cloze questions: a sentence with one blank, in a form that each family of language models can answer.

Encoders predict a masked token; T5 predicts the text of the sentinel ``<extra_id_0>``; BART continues from the position
of the mask; decoders continue the words before the blank. Answers of several tokens, and blanks in the middle of a
decoder's sentence, are scored as whole answers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring import Blank, Question
from knowledge_compression.evaluation.tokens import encode
from knowledge_compression.heavy import torch
from knowledge_compression.models.families import DECODER, ENCODER
from knowledge_compression.progress import counted

if TYPE_CHECKING:
    from torch import Tensor

    from knowledge_compression.evaluation.scoring import Scorer

MASK = "[MASK]"
_SENTINEL = "<extra_id_{}>"
_REPEATS_THE_SENTENCE = ("bart",)  # fills a mask by repeating the whole sentence


@dataclass(frozen=True)
class Cloze:
    """One fact in one wording.

    Attributes:
        task: the relation, e.g. ``TREx.P19``.
        id: stable identifier of this fact in this wording.
        fact: stable identifier of the fact in any wording.
        subject, gold: the subject and the right answer.
        sentence: contains one ``[MASK]`` or several.
        wording: the template, or ``sentence``; calibration averages over prompts of one wording.
        mask: index of the mask that is asked, from 0; only encoders can be asked about any but the first.
    """

    task: str
    id: str
    fact: str
    subject: str
    gold: str
    sentence: str
    wording: str
    mask: int = 0

    @property
    def before(self) -> str:
        """The words before the blank."""
        return MASK.join(self.sentence.split(MASK)[: self.mask + 1])

    @property
    def after(self) -> str:
        """The words after the blank."""
        return self.sentence.split(MASK, self.mask + 1)[-1]

    @property
    def ends_in_blank(self) -> bool:
        """Whether only punctuation follows the blank."""
        return not any(character.isalnum() for character in self.after)

    @property
    def glued(self) -> bool:
        """Whether the blank follows its left neighbour without a space, or begins the sentence."""
        return not self.before[-1:].isspace()


def fill(template: str, subject: str) -> str:
    """Fill a subject into a LAMA template (``[X] is the capital of [Y].``) and mask the object; letter case is kept."""
    return template.replace("[X]", subject).replace("[Y]", MASK)


def opened(sentence: str) -> str:
    """Capitalise a sentence, unless its first word contains capital letters of its own (``iOS``)."""
    word = sentence.split(maxsplit=1)[0]
    return sentence if any(letter.isupper() for letter in word) else sentence[0].upper() + sentence[1:]


class Reader:
    """The form in which one model reads clozes and answers; made by :func:`reader_of`.

    Args:
        scorer: scores with the model, of any family.
        max_tokens: sentences are truncated to this length; None uses the model's own limit.

    Attributes:
        needs_blank: whether a cloze whose mask was cut off cannot be asked.
    """

    needs_blank = True

    def __init__(self, scorer: Scorer, max_tokens: int | None = None) -> None:
        self.scorer = scorer
        self.model = scorer.model
        self.tokenizer = scorer.model.tokenizer
        limits = [limit for limit in (max_tokens, scorer.max_positions) if limit is not None]
        self.limit = min(limits) if limits else None
        # Byte-level tokenizers use different tokens for a word after a space and for the word alone.
        self._space_matters = self._ids(["the the"])[0][-1:] != self._ids(["the"])[0][-1:]

    def answer_ids(self, answers: Sequence[str], *, glued: bool = False) -> list[tuple[int, ...]]:
        """Token ids of each answer as it appears in a blank; empty if the tokenizer does not know it."""
        lead = " " if self._space_matters and not glued else ""
        unknown = self.tokenizer.unk_token_id
        return [
            () if unknown is not None and unknown in ids else tuple(ids)
            for ids in self._ids([lead + answer for answer in answers])
        ]

    def blanks(self, clozes: Sequence[Cloze]) -> list[Blank | None]:
        """The blank to predict; None if the model cannot be asked in this way."""
        raise NotImplementedError

    def add_long_answers(self, scorer: Scorer, asked: Sequence[Asked], candidates: Candidates) -> None:
        """Add the scores of answers that a single blank cannot score."""
        raise NotImplementedError

    def _ids(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        return encode(self.tokenizer, texts, special_tokens=special)

    def _inputs(self, texts: Sequence[str]) -> list[list[int]]:
        return encode(self.tokenizer, texts, most=self.limit)


class Candidates:
    """The answers among which each task's clozes are ranked, as one model's tokens.

    Args:
        reader: the reader of that model.
        answers: the distinct answers of each task.
    """

    def __init__(self, reader: Reader, answers: Mapping[str, Sequence[str]]) -> None:
        self.answers = answers
        self._reader = reader
        self._tokens: dict[tuple[str, bool], list[tuple[int, ...]]] = {}

    def tokens(self, cloze: Cloze) -> list[tuple[int, ...]]:
        """Token ids of every answer of the cloze's task as it appears in that blank."""
        key = (cloze.task, cloze.glued)
        if key not in self._tokens:
            self._tokens[key] = self._reader.answer_ids(self.answers[cloze.task], glued=cloze.glued)
        return self._tokens[key]

    def of_length(self, cloze: Cloze, length: int) -> tuple[list[int], list[tuple[int, ...]]]:
        """Indices among the candidates, and tokens, of the answers of ``length`` tokens."""
        places = [i for i, ids in enumerate(self.tokens(cloze)) if len(ids) == length]
        return places, [self.tokens(cloze)[i] for i in places]


@dataclass(frozen=True)
class Asked:
    """A cloze being scored: its blank, if it has one, and the scores of its candidates so far."""

    cloze: Cloze
    blank: Blank | None
    scores: Tensor


def candidate_scores(
    reader: Reader, clozes: Sequence[Cloze], blanks: Sequence[Blank | None], candidates: Candidates
) -> list[Tensor]:
    """Log-probability of each candidate in each blank.

    Candidates of one token are read from a single next-token (masked-token) distribution. Longer ones are scored as a
    whole: for encoders by one mask per token, summing each token's log-probability with all of them masked; for the
    others by the log-likelihood of the tokens (and, for decoders, of the rest of the sentence).

    Args:
        reader: the reader of the model.
        clozes: the clozes to ask.
        blanks: :meth:`Reader.blanks` of the clozes.
        candidates: the answers to score.

    Returns:
        One float64 tensor ``[candidates of its task]`` per cloze, on the CPU; -inf for answers that the tokenizer does
        not know.
    """
    scorer = reader.scorer
    asked = [
        Asked(cloze, blank, torch.full((len(candidates.answers[cloze.task]),), -torch.inf, dtype=torch.float64))
        for cloze, blank in zip(clozes, blanks, strict=True)
    ]
    direct = [one for one in asked if one.blank is not None]
    singles = [candidates.of_length(one.cloze, 1) for one in direct]
    for batch, log_probs in distributions(scorer, [one.blank for one in direct if one.blank is not None]):
        width = max(len(singles[b][0]) for b in batch)
        columns = [[ids[0] for ids in singles[b][1]] + [0] * (width - len(singles[b][0])) for b in batch]
        index = torch.tensor(columns, dtype=torch.long, device=log_probs.device).reshape(len(batch), width)
        for b, row in zip(batch, log_probs.gather(1, index).cpu().double(), strict=True):
            places = singles[b][0]
            direct[b].scores[places] = row[: len(places)]
    reader.add_long_answers(scorer, asked, candidates)
    return [one.scores for one in asked]


def distributions(scorer: Scorer, blanks: Sequence[Blank]) -> Iterator[tuple[list[int], Tensor]]:
    """:meth:`Scorer.distributions` with a progress bar if the output is a terminal."""
    with counted(len(blanks), "asking") as advance:
        for batch, log_probs in scorer.distributions(blanks):
            yield batch, log_probs
            advance(len(batch))


class _EncoderReader(Reader):
    """Masked tokens."""

    def blanks(self, clozes: Sequence[Cloze]) -> list[Blank | None]:
        rows = self._inputs([cloze.sentence.replace(MASK, self.tokenizer.mask_token) for cloze in clozes])
        mask = self.tokenizer.mask_token_id
        return [
            Blank(ids, places[cloze.mask], items=(cloze.id,)) if len(places) > cloze.mask else None
            for ids, cloze in zip(rows, clozes, strict=True)
            for places in ([place for place, token in enumerate(ids) if token == mask],)
        ]

    def add_long_answers(self, scorer: Scorer, asked: Sequence[Asked], candidates: Candidates) -> None:
        blanks: list[Blank] = []
        targets: list[tuple[Tensor, list[int], list[int]]] = []  # scores, indices among the candidates, token ids
        for one in asked:
            blank = one.blank
            assert blank is not None and blank.position is not None  # with a blank
            for length in sorted({len(ids) for ids in candidates.tokens(one.cloze)} - {0, 1}):
                ids, at = self._with_room(blank.ids, blank.position, length - 1)
                wide = ids[:at] + ids[at : at + 1] * length + ids[at + 1 :]
                places, answers = candidates.of_length(one.cloze, length)
                one.scores[places] = 0.0
                for offset in range(length):
                    blanks.append(Blank(wide, at + offset, items=blank.items))
                    targets.append((one.scores, places, [answer[offset] for answer in answers]))
        for batch, log_probs in distributions(scorer, blanks):
            for b, row in zip(batch, log_probs, strict=True):
                scores, places, tokens = targets[b]
                scores[places] += row[tokens].cpu().double()

    def _with_room(self, ids: Sequence[int], at: int, more: int) -> tuple[list[int], int]:
        """A text and its mask's place, without the last words (or the first) where ``more`` masks would not fit."""
        surplus = max(0, len(ids) + more - (self.scorer.max_positions or len(ids) + more))
        cut = len(ids) - 1 - surplus if at < len(ids) - 1 - surplus else 1  # between the special tokens
        return [*ids[:cut], *ids[cut + surplus :]], at if at < cut else at - surplus


class _GeneratorReader(Reader):
    """The common part of decoders and encoder-decoders: long answers are continuations of a context."""

    def question(self, cloze: Cloze, blank: Blank | None, answers: Sequence[tuple[str, tuple[int, ...]]]) -> Question:
        """The continuations of ``answers``, and last the empty answer if some text must come before an answer."""
        raise NotImplementedError

    def add_long_answers(self, scorer: Scorer, asked: Sequence[Asked], candidates: Candidates) -> None:
        questions, targets = [], []
        for one in asked:
            tokens, answers = candidates.tokens(one.cloze), candidates.answers[one.cloze.task]
            shortest = 1 if one.blank is None else 2  # the blank has already scored answers of one token
            if places := [p for p, ids in enumerate(tokens) if len(ids) >= shortest]:
                questions.append(self.question(one.cloze, one.blank, [(answers[p], tokens[p]) for p in places]))
                targets.append((one.scores, places))
        for (scores, places), likelihoods in zip(targets, scorer.log_likelihoods(questions), strict=True):
            values = torch.tensor([likelihood.log_prob for likelihood in likelihoods], dtype=torch.float64)
            said_before = values[len(places)] if len(values) > len(places) else 0.0
            scores[places] = values[: len(places)] - said_before


class _DecoderReader(_GeneratorReader):
    """Next tokens."""

    needs_blank = False

    def blanks(self, clozes: Sequence[Cloze]) -> list[Blank | None]:
        contexts = self._contexts([cloze.before for cloze in clozes])
        return [
            Blank(ids, items=(cloze.id,)) if ids and cloze.ends_in_blank else None
            for ids, cloze in zip(contexts, clozes, strict=True)
        ]

    def question(self, cloze: Cloze, blank: Blank | None, answers: Sequence[tuple[str, tuple[int, ...]]]) -> Question:
        if blank is not None:
            return self._fitting(blank.ids, [ids for _, ids in answers], cloze)
        lead = "" if cloze.glued else " "
        whole = [lead + answer + cloze.after.replace(MASK, answer) for answer, _ in answers]
        continuations = self._ids(whole if self._space_matters else [text.lstrip() for text in whole])
        return self._fitting(self._contexts([cloze.before])[0] or [self._opening()], continuations, cloze)

    def _fitting(self, context: Sequence[int], continuations: Sequence[Sequence[int]], cloze: Cloze) -> Question:
        """A question without the beginning of its context, and without the end of its sentence, that do not fit."""
        limit = self.limit or sys.maxsize
        room = max(1, limit - max(map(len, continuations)))
        return Question(context[-room:], [ids[:limit] for ids in continuations], (cloze.id,))

    def _contexts(self, texts: Sequence[str]) -> list[list[int]]:
        rows = self._ids([text.rstrip() for text in texts], special=True)
        end = {self.tokenizer.eos_token_id, self.tokenizer.sep_token_id}
        return [
            (ids[:-1] if len(ids) > 1 and ids[-1] in end else ids)[-(self.limit or len(ids) or 1) :] for ids in rows
        ]

    def _opening(self) -> int:
        """The token before the first word: the BOS token, or the token that ends a text."""
        begin = self.tokenizer.bos_token_id
        return begin if begin is not None else self.tokenizer.eos_token_id


class _SentinelReader(_GeneratorReader):
    """T5: the decoder predicts the text of ``<extra_id_0>`` (Raffel et al. 2020, span corruption)."""

    def blanks(self, clozes: Sequence[Cloze]) -> list[Blank | None]:
        first = self.tokenizer.convert_tokens_to_ids(_SENTINEL.format(0))
        start = self.model.decoder_start
        rows = self._inputs([self._with_sentinels(cloze.sentence) for cloze in clozes])
        return [
            Blank(ids, decoder_ids=(start, first), items=(cloze.id,)) if first in ids else None
            for ids, cloze in zip(rows, clozes, strict=True)
        ]

    def question(self, cloze: Cloze, blank: Blank | None, answers: Sequence[tuple[str, tuple[int, ...]]]) -> Question:
        assert blank is not None  # with a blank
        said = list(blank.decoder_ids[1:])
        return Question(blank.ids, [*([*said, *ids] for _, ids in answers), *([said] if said else [])], blank.items)

    @staticmethod
    def _with_sentinels(sentence: str) -> str:
        parts = sentence.split(MASK)
        return parts[0] + "".join(_SENTINEL.format(i) + part for i, part in enumerate(parts[1:]))


class _RepeatingReader(_SentinelReader):
    """BART: the decoder repeats the sentence up to the mask, then predicts the masked text (Lewis et al. 2020)."""

    def blanks(self, clozes: Sequence[Cloze]) -> list[Blank | None]:
        mask, start = self.tokenizer.mask_token_id, self.model.decoder_start
        rows = self._inputs([cloze.sentence.replace(MASK, self.tokenizer.mask_token) for cloze in clozes])
        return [
            Blank(ids, decoder_ids=(start, *ids[: ids.index(mask)]), items=(cloze.id,)) if mask in ids else None
            for ids, cloze in zip(rows, clozes, strict=True)
        ]


def reader_of(scorer: Scorer, max_tokens: int | None = None) -> Reader:
    """The reader for the model of ``scorer``, by its family.

    Raises:
        BadInput: its tokenizer has no token for a blank.
    """
    if scorer.model.family == DECODER:
        return _DecoderReader(scorer, max_tokens)
    model, tokenizer = scorer.model, scorer.model.tokenizer
    kind: type[Reader]
    if model.family == ENCODER or model.network.config.model_type in _REPEATS_THE_SENTENCE:
        kind, blank = (_EncoderReader if model.family == ENCODER else _RepeatingReader), tokenizer.mask_token
    else:
        kind, blank = _SentinelReader, _SENTINEL.format(0)
    if blank is None or blank not in tokenizer.get_vocab():
        raise BadInput(
            f"the tokenizer of {model.name} has no {blank or 'mask token'}, which marks a blank for a model of its "
            "family; use the tokenizer that it was trained with"
        )
    return kind(scorer, max_tokens)
