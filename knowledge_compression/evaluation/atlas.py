"""The embedded fact probe: about a thousand facts that a small model may know, in several wordings, for all families.

The facts are stored beside this file in LAMA's layout (``atlas_facts/``): one file per relation with ``sub_label`` and
``obj_label``, and ``relations.jsonl`` with the templates. They were written for this project from common knowledge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.calibration import SAMPLING, Questions, sampled
from knowledge_compression.evaluation.cloze import Cloze, fill, opened
from knowledge_compression.evaluation.probe import Probe
from knowledge_compression.evaluation.suite import Evaluation
from knowledge_compression.models import Model

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring import Scorer

_FOLDER = Path(__file__).with_name("atlas_facts")
WORDINGS = ("rotate", "all")


@dataclass(frozen=True)
class Atlas:
    """The embedded probe as a suite.

    Attributes:
        relations: the relations to ask; None asks all.
        wordings: ``rotate`` asks every fact once, cycling through those wordings of its relation that end in the
            object, the same questions for all families; ``all`` asks every fact in every wording.
        candidates, calibrate, top_k: as in :class:`Probe`. By default the relation's own objects are ranked, calibrated
            by their means, which works even for a model with a weak head.
        limit: a random sample of at most this many questions, with the same answers as in the whole: with ``calibrate``
            the other prompts of their relations and wordings are read too, so a small sample is not much faster.
    """

    relations: Sequence[str] | None = None
    wordings: str = "rotate"
    candidates: str = "typed"
    calibrate: bool = True
    top_k: Sequence[int] = (10,)
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuse unknown relations, wordings and candidates."""
        if self.wordings not in WORDINGS:
            raise BadInput(f"atlas.wordings='{self.wordings}' does not exist; choose one of {', '.join(WORDINGS)}")
        if self.candidates == "common":
            raise BadInput("atlas.candidates=common: the atlas has no list of common words; choose full or typed")
        there = [relation["relation"] for relation in atlas_relations()]
        if unknown := sorted(set(self.relations or ()) - set(there)):
            raise BadInput(f"atlas has no relation '{unknown[0]}'; relations: {', '.join(there)}")
        self._probe()
        sampled([], self.limit)

    def fingerprint(self) -> str:
        """Digest of the embedded facts and of the method of sampling and calibration."""
        digest = hashlib.sha256(SAMPLING if self.limit is not None else b"")
        for path in sorted(_FOLDER.glob("*.jsonl")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]

    def clozes(self) -> list[Cloze]:
        """The questions, in the order of relations and of facts in their files."""
        return [
            cloze
            for relation in atlas_relations()
            if self.relations is None or relation["relation"] in self.relations
            for cloze in _clozes(relation, every_wording=self.wordings == "all")
        ]

    def questions(self, model: Model) -> Questions:
        """The questions for any model."""
        return Questions.sample(self.clozes(), self.limit)

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask every fact."""
        evaluation = self._probe().ask("atlas", scorer, self.questions(scorer.model))
        evaluation.description |= {"facts": self.fingerprint(), "wordings": self.wordings, "limit": self.limit}
        return evaluation

    def _probe(self) -> Probe:
        return Probe(self.candidates, self.calibrate, tuple(self.top_k))


def atlas_relations() -> list[dict[str, Any]]:
    """The relations: ``relation``, ``label``, ``template`` (LAMA's name for the first wording), ``wordings``."""
    return [json.loads(line) for line in (_FOLDER / "relations.jsonl").read_text("utf-8").splitlines()]


def atlas_facts(relation: str) -> list[dict[str, str]]:
    """The facts of a relation: ``uuid``, ``predicate_id``, ``sub_label``, ``obj_label``."""
    return [json.loads(line) for line in (_FOLDER / f"{relation}.jsonl").read_text("utf-8").splitlines()]


def _clozes(relation: dict[str, Any], *, every_wording: bool) -> list[Cloze]:
    name = relation["relation"]
    wordings = dict(enumerate(relation["wordings"]))
    at_the_end = [n for n, wording in wordings.items() if wording.endswith("[Y].")]
    clozes = []
    for turn, fact in enumerate(atlas_facts(name)):
        key = f"{name}/{fact['uuid']}"
        for n in wordings if every_wording else [at_the_end[turn % len(at_the_end)]]:
            sentence = opened(fill(wordings[n], fact["sub_label"]))
            clozes.append(Cloze(name, f"{key}/{n}", key, fact["sub_label"], fact["obj_label"], sentence, str(n)))
    return clozes
