"""LAMA (Petroni et al. 2019, "Language Models as Knowledge Bases?") for all three families.

T-REx, Google-RE, SQuAD and ConceptNet in the original file layout (``DIR/lama/TREx/P19.jsonl``, ...), or from the hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.calibration import SAMPLING, Questions, sampled
from knowledge_compression.evaluation.cloze import Cloze, fill
from knowledge_compression.evaluation.lama_data import HUB_ID, HUB_REVISION, LAYOUT, Fact, LamaFolder, LamaHub
from knowledge_compression.evaluation.probe import CANDIDATES, Probe
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import Evaluation
from knowledge_compression.identity import PLACE
from knowledge_compression.models import Model

# What a protocol decides: whether T-REx is asked by template, and the first paper's habits (Namburi et al. 2023, 7.3).
PROTOCOLS: Mapping[str, Mapping[str, Any]] = {
    "template": {"templates": True},
    "sentence": {"templates": False},
    "paper": {
        "templates": False,
        "drop_duplicates": True,
        "asked_as": {"lower_case": True, "keep_long": True, "max_tokens": 128},
    },
}


@dataclass(frozen=True)
class Lama:
    """LAMA as a suite.

    Attributes:
        data_dir: a folder with ``lama/`` inside; None takes the hub.
        datasets: which of TREx, Google_RE, Squad, ConceptNet to ask. Those that are not there are named in the
            result; it is an error only where none is.
        protocol: ``template`` asks T-REx by the templates of ``relations.jsonl`` and the others by their masked
            sentences; ``sentence`` asks all by masked sentences, of each fact the first that has a mask; ``paper`` is
            the first paper's: masked sentences cut at 128 tokens, the full vocabulary, predictions and answers
            lower-cased, the same sentence with the same answer asked once, objects of several tokens counted as
            wrong, accuracy over all items alike.
        candidates, calibrate, top_k: as in :class:`Probe`; ``common`` reads ``lama/common_vocab_cased.txt``.
        limit: a sample of at most so many questions, from all parts of the data sets. With ``calibrate`` up to 128
            prompts of each relation among them are read too, so that a sample is calibrated as the whole is.
        hub_id, revision: where the hub keeps it.
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
        """Refuse what does not exist or does not go together."""
        if self.protocol not in PROTOCOLS:
            raise BadInput(f"lama.protocol='{self.protocol}' does not exist; choose one of {', '.join(PROTOCOLS)}")
        if self.protocol == "paper" and (self.candidates in CANDIDATES[1:] or self.calibrate):
            raise BadInput("lama.protocol=paper ranks the full vocabulary uncalibrated; drop candidates and calibrate")
        if unknown := [name for name in self.datasets if name not in LAYOUT]:
            raise BadInput(f"lama has no data set '{unknown[0]}'; choose from {', '.join(LAYOUT)}")
        self._probe()
        sampled([], self.limit)

    def fingerprint(self) -> str:
        """Digest of the files that are read, or the hub's id and revision; broken files are refused here."""
        if self.data_dir is None:
            return f"{self.hub_id}@{self.revision}{':' + SAMPLING.decode() if self.limit is not None else ''}"
        self.clozes()
        digest = hashlib.sha256(SAMPLING if self.limit is not None else b"")
        for path in self._source.files(self._found):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]

    def clozes(self) -> list[Cloze]:
        """The questions in the order of the data sets, their files and lines.

        Raises:
            DataUnavailable: none of the data sets is there.
            BadInput: a line is not what LAMA has; its file and number are named.
        """
        return self._questions[0]

    def questions(self, model: Model) -> Questions:
        """What is asked of any model."""
        return Questions.sample(self.clozes(), self.limit)

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask everything that is there."""
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
        asked_as = PROTOCOLS[self.protocol].get("asked_as", {})
        return Probe(self.candidates, self.calibrate, tuple(self.top_k), **asked_as)

    @cached_property
    def _found(self) -> list[str]:
        found = [name for name in self.datasets if self._source.has(name)]
        if not found:
            raise DataUnavailable(f"eval=lama: {self._source.why_nothing(self.datasets)}")
        return found

    @cached_property
    def _questions(self) -> tuple[list[Cloze], int]:
        """The questions, and how many duplicates were dropped on the way to them."""
        protocol = PROTOCOLS[self.protocol]
        templates = self._source.templates() if protocol["templates"] and "TREx" in self._found else {}
        facts = [fact for name in self._found for fact in self._source.facts(name)]
        clozes = [_cloze(fact, templates) for fact in facts]
        if not protocol.get("drop_duplicates"):
            return clozes, 0
        distinct = {(cloze.sentence.lower(), cloze.gold.lower()): cloze for cloze in reversed(clozes)}
        kept = {id(cloze) for cloze in distinct.values()}
        return [cloze for cloze in clozes if id(cloze) in kept], len(clozes) - len(kept)

    @cached_property
    def _source(self) -> LamaFolder | LamaHub:
        if self.data_dir is None:
            return LamaHub(self.hub_id, self.revision)
        return LamaFolder(Path(self.data_dir).expanduser() / "lama")


def _cloze(fact: Fact, templates: Mapping[str, str]) -> Cloze:
    key = f"{fact.task}/{fact.id}"
    if fact.dataset != "TREx" or not templates:
        if not fact.sentence:
            raise BadInput(f"lama: {key} has no evidence to ask by; take protocol=template")
        return Cloze(fact.task, f"{key}/sentence", key, fact.subject, fact.gold, fact.sentence, "sentence")
    if fact.relation not in templates:
        raise BadInput(f"lama/relations.jsonl has no template for {fact.relation}; add it, or take protocol=sentence")
    sentence = fill(templates[fact.relation], fact.subject)
    return Cloze(fact.task, f"{key}/template", key, fact.subject, fact.gold, sentence, "template")


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
