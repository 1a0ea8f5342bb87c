"""LAMA (Petroni et al. 2019, "Language Models as Knowledge Bases?") for all three families.

T-REx, Google-RE, SQuAD and ConceptNet in the original file layout (``DIR/lama/TREx/P19.jsonl``, ...), or from the hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.calibration import SAMPLING, Questions, sampled
from knowledge_compression.evaluation.cloze import MASK, Cloze, fill
from knowledge_compression.evaluation.lama_data import (
    GOOGLE_RE,
    HUB_ID,
    HUB_REVISION,
    LAYOUT,
    Fact,
    LamaFolder,
    LamaHub,
)
from knowledge_compression.evaluation.probe import CANDIDATES, Probe
from knowledge_compression.evaluation.suite import Evaluation
from knowledge_compression.heavy import pl
from knowledge_compression.identity import PLACE
from knowledge_compression.models import Model
from knowledge_compression.models.families import ENCODER

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring import Scorer

READING = b"lama 2"  # version of the code from files to questions; raised when it changes


@dataclass(frozen=True)
class Protocol:
    """A protocol for probing facts.

    Attributes:
        by_template: the data sets that are asked by template; the others are asked by masked sentences.
        distinct: of identical sentences only the first is asked, even if their answers differ.
        every_mask: each mask of a sentence is a question if the model is an encoder; otherwise only the first is.
        asked_as: the fields of :class:`Probe` that differ from its defaults.
    """

    by_template: Sequence[str] = ()
    distinct: bool = False
    every_mask: bool = False
    asked_as: Mapping[str, Any] = field(default_factory=dict)


PROTOCOLS: Mapping[str, Protocol] = {
    "template": Protocol(("TREx",)),
    "sentence": Protocol(),
    # The only protocol that gives the counts in the first paper's Table 3 (Namburi et al. 2023; docs/reproduction.md).
    "paper": Protocol(
        ("TREx", "Google_RE"),
        distinct=True,
        every_mask=True,
        asked_as={"lower_case": True, "keep_long": True, "max_tokens": 128},
    ),
}


@dataclass(frozen=True)
class Lama:
    """LAMA as a suite.

    Attributes:
        data_dir: a folder that contains ``lama/``; None uses the hub.
        datasets: which of TREx, Google_RE, Squad, ConceptNet to ask. The result names those that are missing; it is an
            error only if all are.
        protocol: ``template`` asks T-REx by the templates of ``relations.jsonl`` and the others by their masked
            sentences; ``sentence`` asks all by masked sentences, using the first sentence of each fact that has a mask;
            ``paper`` is the first paper's: T-REx and Google-RE by LAMA's templates, the others by masked sentences,
            truncated to 128 tokens, full vocabulary, predictions and answers lower-cased, identical sentences asked
            once with the first answer, every mask of a sentence a separate question (for encoders), objects of several
            tokens counted as wrong, accuracy over all items.
        candidates, calibrate, top_k: as in :class:`Probe`; ``common`` reads ``lama/common_vocab_cased.txt``.
        limit: a random sample of at most this many questions, from all parts of the data sets. With ``calibrate`` up to
            128 prompts of each relation among them are read too, so that a sample is calibrated like the whole.
        hub_id, revision: the data set on the hub.
    """

    data_dir: str | None = field(default=None, metadata=PLACE)
    datasets: Sequence[str] = tuple(LAYOUT)
    protocol: str = "template"
    candidates: str = "full"
    calibrate: bool = False
    top_k: Sequence[int] = (10,)
    limit: int | None = None
    hub_id: str = HUB_ID
    revision: str = HUB_REVISION

    def __post_init__(self) -> None:
        """Refuse unknown settings and combinations that contradict one another."""
        if self.protocol not in PROTOCOLS:
            raise BadInput(f"lama.protocol='{self.protocol}' does not exist; choose one of {', '.join(PROTOCOLS)}")
        if self.protocol == "paper" and (self.candidates in CANDIDATES[1:] or self.calibrate):
            raise BadInput("lama.protocol=paper ranks the full vocabulary uncalibrated; drop candidates and calibrate")
        if unknown := [name for name in self.datasets if name not in LAYOUT]:
            raise BadInput(f"lama has no data set '{unknown[0]}'; choose from {', '.join(LAYOUT)}")
        self._probe()
        sampled([], self.limit)

    def fingerprint(self) -> str:
        """Digest of the files that are read, or the hub's id and revision; damaged files are refused here."""
        if self.data_dir is None:
            how = READING + (SAMPLING if self.limit is not None else b"")
            return f"{self.hub_id}@{self.revision}:{how.decode()}"
        self.clozes()
        digest = hashlib.sha256(READING + (SAMPLING if self.limit is not None else b""))
        for path in self._source.files(self._found):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]

    def check_data(self) -> None:
        """Refuse data sets that are not available."""
        self.clozes()

    def clozes(self) -> list[Cloze]:
        """The questions in the order of the data sets, their files and lines.

        Raises:
            DataUnavailable: none of the data sets is available.
            BadInput: a line is not in LAMA's format; the message names its file and number.
        """
        return self._questions[0]

    def questions(self, model: Model) -> Questions:
        """The questions for a model: for an encoder every mask, if the protocol says so."""
        clozes = self.clozes()
        if PROTOCOLS[self.protocol].every_mask and model.family == ENCODER:
            clozes = [one for cloze in clozes for one in _of_every_mask(cloze)]
        return Questions.sample(clozes, self.limit)

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask every fact that is available."""
        _, duplicates = self._questions
        common = self._source.common_words() if self.candidates == "common" else ()
        evaluation = self._probe().ask("lama", scorer, self.questions(scorer.model), common)
        evaluation.metrics |= _by_dataset(evaluation)
        evaluation.description |= {
            "protocol": self.protocol,
            "data_sets": self._found,
            "data_sets_missing": [name for name in self.datasets if name not in self._found],
            "facts": self.fingerprint(),
            "limit": self.limit,
            "duplicates_dropped": duplicates,
        }
        return evaluation

    def _probe(self) -> Probe:
        return Probe(self.candidates, self.calibrate, tuple(self.top_k), **PROTOCOLS[self.protocol].asked_as)

    @cached_property
    def _found(self) -> list[str]:
        found = [name for name in self.datasets if self._source.has(name)]
        if not found:
            raise DataUnavailable(f"eval=lama: {self._source.why_nothing(self.datasets)}")
        return found

    @cached_property
    def _questions(self) -> tuple[list[Cloze], int]:
        """The questions, and the number of duplicates dropped."""
        protocol = PROTOCOLS[self.protocol]
        templates: dict[str, Mapping[str, str]] = {}
        for name in set(protocol.by_template) & set(self._found):
            templates[name] = GOOGLE_RE if name == "Google_RE" else self._source.templates()
        clozes = [_cloze(fact, templates.get(name)) for name in self._found for fact in self._source.facts(name)]
        if not protocol.distinct:
            return clozes, 0
        first = {(cloze.task.partition(".")[0], cloze.sentence): cloze for cloze in reversed(clozes)}
        kept = {id(cloze) for cloze in first.values()}
        return [cloze for cloze in clozes if id(cloze) in kept], len(clozes) - len(kept)

    @cached_property
    def _source(self) -> LamaFolder | LamaHub:
        if self.data_dir is None:
            return LamaHub(self.hub_id, self.revision)
        return LamaFolder(Path(self.data_dir).expanduser() / "lama")


def _cloze(fact: Fact, templates: Mapping[str, str] | None) -> Cloze:
    key = f"{fact.task}/{fact.id}"
    if templates is None:
        if not fact.sentence:
            raise BadInput(f"lama: {key} has no evidence sentence; choose protocol=template")
        return Cloze(fact.task, f"{key}/sentence", key, fact.subject, fact.gold, fact.sentence, "sentence")
    if fact.relation not in templates:
        raise BadInput(f"lama has no template for {fact.task} (relations.jsonl); add it, or choose protocol=sentence")
    sentence = fill(templates[fact.relation], fact.subject)
    return Cloze(fact.task, f"{key}/template", key, fact.subject, fact.gold, sentence, "template")


def _of_every_mask(cloze: Cloze) -> list[Cloze]:
    later = (replace(cloze, id=f"{cloze.id}#{n + 1}", mask=n) for n in range(1, cloze.sentence.count(MASK)))
    return [cloze, *later]


def _by_dataset(evaluation: Evaluation) -> dict[str, float]:
    """Accuracy of each data set: over its items, and averaged over its relations."""
    by_task = evaluation.items.group_by("task").agg(pl.col("correct").sum(), pl.len()).sort("task")
    data_set = pl.col("task").str.split(".").list.first().alias("data_set")
    return {
        f"{name}.{kind}": value
        for name, micro, macro in by_task.group_by(data_set)
        .agg(pl.col("correct").sum() / pl.col("len").sum(), macro=(pl.col("correct") / pl.col("len")).mean())
        .sort("data_set")
        .iter_rows()
        for kind, value in (("accuracy", micro), ("accuracy_macro", macro))
    }
