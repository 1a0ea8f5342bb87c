"""Questions that the model answers in its own words: greedy generation, compared with the accepted answers as text."""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.calibration import sampled
from knowledge_compression.evaluation.tabular import Source
from knowledge_compression.identity import PLACE
from knowledge_compression.models.families import ENCODER

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring import Scorer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class OpenQuestion:
    """A question.

    Attributes:
        number: its index in the data set, from 0.
        prompt: the input of the model.
        answers: the accepted answers; the first is shown as the right one.
        choices: the candidates among which the first answer, one of them, is ranked; empty if nothing is ranked.
    """

    number: int
    prompt: str
    answers: Sequence[str]
    choices: Sequence[str] = ()

    @property
    def id(self) -> str:
        """Its id, made of its index and its content."""
        from knowledge_compression.evaluation.lm import item_id

        return item_id(self.number, self._document)

    @property
    def _document(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "answers": list(self.answers)}

    def request(self, kind: str, arguments: tuple[Any, ...], index: int = 0) -> Any:
        """The question as a request of lm-eval."""
        from lm_eval.api.instance import Instance

        return Instance(kind, self._document, arguments, index, ("", self.number, 1))


@dataclass(frozen=True)
class OpenSuite(ABC):
    """The common part of suites of open questions.

    Attributes:
        data_dir: a folder that contains one of ``NAMES``; None uses the hub.
        prompt: the input of the model, with ``{question}``.
        most: the largest number of tokens generated for an answer, of which only the first line counts.
        limit: a random sample of at most this many questions.
        hub_id: the data set on the hub.
    """

    SUITE: ClassVar[str]
    READING: ClassVar[str]  # version of the code from rows to results; raised when it changes
    NAMES: ClassVar[Sequence[str]]
    COLUMNS: ClassVar[Sequence[str]]
    data_dir: str | None = field(default=None, metadata=PLACE)
    prompt: str = "Q: {question}\nA:"
    most: int = 15
    limit: int | None = None
    hub_id: str = ""

    def __post_init__(self) -> None:
        """Refuse options that leave nothing to ask."""
        if "{question}" not in self.prompt:
            raise BadInput(f"{self.SUITE}.prompt='{self.prompt}' lacks {{question}}")
        if self.most < 1:
            raise BadInput(f"{self.SUITE}.most={self.most} generates no text; choose a number from 1 on")
        sampled([], self.limit)

    def fingerprint(self) -> str:
        """Digest of the file that is read, or the hub's id; a damaged file is refused here."""
        if self.data_dir is not None:
            self.check_data()
        return self._source.digest(self.READING)

    def check_data(self) -> None:
        """Refuse data that is not available."""
        _ = self._questions

    @property
    def _source(self) -> Source:
        return Source(self.SUITE, self.data_dir, self.NAMES, self.COLUMNS, self.hub_id)

    @property
    @abstractmethod
    def _questions(self) -> Any:
        """The questions, read from the source."""


def said(scorer: Scorer, questions: Sequence[OpenQuestion], most: int) -> list[str]:
    """The first line that the model generates after each prompt, greedily, of at most ``most`` tokens.

    Raises:
        BadInput: the model is an encoder.
    """
    from knowledge_compression.evaluation.lm import ScorerLM

    options = {"until": ["\n"], "max_gen_toks": most, "do_sample": False}
    requests = [one.request("generate_until", (one.prompt, dict(options))) for one in questions]
    return [text.strip() for text in ScorerLM(scorer).generate_until(requests)]


def check_family(suite: str, scorer: Scorer) -> None:
    """Refuse encoders, which generate no text."""
    if scorer.model.family == ENCODER:
        raise BadInput(
            f"eval={suite} needs a decoder or an encoder-decoder, and {scorer.model.name} is an encoder; "
            "choose eval=bear, eval=pararel, eval=lama or eval=atlas"
        )


def log_probs(scorer: Scorer, questions: Sequence[OpenQuestion]) -> list[list[float]]:
    """The log-probability of each choice of each question, after its prompt and a space, in nats."""
    from knowledge_compression.evaluation.lm import ScorerLM

    requests = [
        one.request("loglikelihood", (one.prompt, f" {choice}"), i)
        for one in questions
        for i, choice in enumerate(one.choices)
    ]
    scores = iter(ScorerLM(scorer).loglikelihood(requests))
    return [[next(scores)[0] for _ in one.choices] for one in questions]


def normal(text: str) -> str:
    """The text in lower case, without punctuation, articles and extra spaces (as for SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def matches(text: str, answers: Sequence[str]) -> bool:
    """Whether the text is one of the answers, both normalized."""
    return normal(text) in {normal(answer) for answer in answers if normal(answer)}


def contains(text: str, answers: Sequence[str]) -> bool:
    """Whether the text contains one of the answers as whole words, both normalized."""
    within = f" {normal(text)} "
    return any(f" {normal(answer)} " in within for answer in answers if normal(answer))
