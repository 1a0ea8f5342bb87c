"""BEAR in its own protocol: the model's answer is the one of the relation that makes the whole sentence most likely.

Wiland, Ploner & Akbik 2024, "BEAR: A Unified Framework for Evaluating Relational Knowledge in Causal and Masked
Language Models".

Scores and ranks are those of the reference implementation, lm-pub-quiz 0.3.3 (``benchmarks/bear.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.bear_data import BearFolder, BearRelation
from knowledge_compression.evaluation.calibration import sampled
from knowledge_compression.evaluation.cloze import MASK
from knowledge_compression.evaluation.probe import EXTRA_COLUMNS, Probe, cloze_metrics
from knowledge_compression.evaluation.sentences import Statement, scores_of_answers
from knowledge_compression.evaluation.suite import Evaluation, Suite, item_table
from knowledge_compression.evaluation.wordings import wording_metrics
from knowledge_compression.heavy import pl
from knowledge_compression.identity import PLACE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from knowledge_compression.evaluation.scoring import Scorer

READING = b"bear 1"  # version of the code from files to scores; raised when it changes


@dataclass(frozen=True)
class Bear:
    """BEAR as a suite, asked relation by relation.

    Attributes:
        data_dir: a folder that contains ``bear/``.
        dataset: the folder in it, ``BEAR`` or ``BEAR-big``.
        lite: only the facts of ``bear/bear_lite_indices.json``, which chooses from BEAR-big, and their answers.
        relations: the relations to ask; None asks all.
        templates: indices of the templates to ask, from 0; None asks all three.
        top_k: the k of the top-k metrics.
        limit: a random sample of at most this many facts, each asked in every template, with all answers of its
            relation.
    """

    data_dir: str | None = field(default=None, metadata=PLACE)
    dataset: str = "BEAR"
    lite: bool = False
    relations: Sequence[str] | None = None
    templates: Sequence[int] | None = None
    top_k: Sequence[int] = (10,)
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuse invalid templates, and the options that every cloze suite refuses."""
        if self.templates is not None and (not self.templates or len(set(self.templates)) < len(self.templates)):
            raise BadInput(
                f"bear.templates={list(self.templates)} is not a list of distinct template numbers, e.g. [0,2]"
            )
        if Path(self.dataset).name != self.dataset:
            raise BadInput(f"bear.dataset={self.dataset} is not a folder name in data_dir/bear, e.g. BEAR")
        Probe(top_k=tuple(self.top_k))
        sampled([], self.limit)

    def fingerprint(self) -> str:
        """Digest of the files that are read; damaged files are refused here."""
        names = list(self._relations)
        digest = hashlib.sha256(READING)
        for path in self._folder.files(names):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]

    def check_data(self) -> None:
        """Refuse missing data."""
        _ = self._relations

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask every fact in every template."""
        return self.joined({name: part.evaluate(scorer) for name, part in self.parts().items()})

    def parts(self) -> dict[str, Suite]:
        """One suite for each relation."""
        every = [
            fact for name, relation in self._relations.items() for fact in ((name, one.id) for one in relation.facts)
        ]
        asked = set(sampled(every, self.limit))
        return {
            name: _OneRelation(relation, self._templates(relation), frozenset(fact for of, fact in asked if of == name))
            for name, relation in self._relations.items()
            if any(of == name for of, _ in asked)
        }

    def joined(self, parts: Mapping[str, Evaluation]) -> Evaluation:
        """The answers of all relations, and their metrics."""
        items = pl.concat([part.items for part in parts.values()])
        described: dict[str, Any] = {
            "protocol": f"sentence scores, reading {READING.decode()}",
            "dataset": self.dataset,
            "lite": self.lite,
            "facts": self.fingerprint(),
            "limit": self.limit,
            "templates": None if self.templates is None else list(self.templates),
            "relations": list(parts),
            "duplicates_dropped": sum(relation.duplicates for relation in self._relations.values()),
            "left_out": {name: n for name, part in parts.items() if (n := part.description["too_long"])},
        }
        fallbacks = [fallback for part in parts.values() for fallback in part.fallbacks]
        not_finite = sum(part.not_finite for part in parts.values())
        if not_finite:
            return Evaluation(
                {"items": float(items.height), "not_finite": float(not_finite)}, items, described, fallbacks, not_finite
            )
        if items.is_empty():
            raise BadInput("eval=bear: every sentence is longer than the model's maximum input")
        return Evaluation(bear_metrics(items, self.top_k), items, described, fallbacks)

    def _templates(self, relation: BearRelation) -> list[int]:
        there = range(len(relation.templates))
        chosen = list(there) if self.templates is None else list(self.templates)
        if unknown := [number for number in chosen if number not in there]:
            raise BadInput(
                f"bear.templates={list(self.templates or ())}: relation {relation.name} has no template {unknown[0]}; "
                f"its templates are {', '.join(map(str, there))}"
            )
        return chosen

    @cached_property
    def _folder(self) -> BearFolder:
        if self.data_dir is None:
            raise DataUnavailable("eval=bear reads a folder: data_dir=DIR with BEAR's release in DIR/bear/BEAR")
        return BearFolder(Path(self.data_dir).expanduser() / "bear" / self.dataset, self.lite)

    @cached_property
    def _relations(self) -> dict[str, BearRelation]:
        there = self._folder.names()
        if unknown := [name for name in self.relations or () if name not in there]:
            raise BadInput(f"bear has no relation '{unknown[0]}'; relations: {', '.join(there)}")
        found = {
            name: self._folder.relation(name) for name in there if self.relations is None or name in self.relations
        }
        for relation in found.values():
            self._templates(relation)
        return found


@dataclass(frozen=True)
class _OneRelation:
    relation: BearRelation
    templates: Sequence[int]
    asked: frozenset[str]

    def evaluate(self, scorer: Scorer) -> Evaluation:
        relation = self.relation
        facts = [fact for fact in relation.facts if fact.id in self.asked]
        keys = [(fact, number) for fact in facts for number in self.templates]
        statements = [
            Statement(
                f"{relation.name}/{fact.id}/{number}",
                relation.templates[number].replace("[X]", fact.subject).replace("[Y]", MASK),
                relation.answers,
                fact.gold,
            )
            for fact, number in keys
        ]
        scores = scores_of_answers(scorer, statements)
        rows = [
            {
                "suite": "bear",
                "task": relation.name,
                "id": statement.id,
                "prompt": statement.sentence,
                "gold": fact.gold,
            }
            | {"subject": fact.subject, "fact": f"{relation.name}/{fact.id}", "wording": str(number)}
            | ranked(fact.gold, relation.answers, of)
            for (fact, number), statement, of in zip(keys, statements, scores, strict=True)
            if of is not None
        ]
        items = item_table(rows, dict.fromkeys(EXTRA_COLUMNS, pl.String()))
        return Evaluation({"items": float(items.height)}, items, {"too_long": len(keys) - items.height})


def ranked(gold: str, answers: Sequence[str], scores: NDArray[np.float64]) -> dict[str, Any]:
    """The answer columns of an item: the answer with the highest score, and how the right one ranks (a tie is wrong).

    A wrong answer without a finite score makes the margin NaN, so that :func:`~.suite.ask` counts the item.
    """
    right = answers.index(gold)
    wrong = [i for i in range(len(answers)) if i != right]
    best = max(wrong, key=lambda i: scores[i])
    rank = 1 + sum(not scores[i] < scores[right] for i in wrong)
    said = right if rank == 1 else best
    margin = float(scores[right]) - float(scores[wrong].max())  # NaN if any score is NaN
    return {
        "prediction": answers[said],
        "correct": rank == 1,
        "log_prob": float(scores[right]),
        "prediction_log_prob": float(scores[said]),
        "margin": margin,
        "rank": rank,
        "choices": len(answers),
    }


def bear_metrics(items: pl.DataFrame, top_k: Sequence[int]) -> dict[str, float]:
    """The metrics of every cloze suite, accuracy by template and, with several templates, knowledge by fact.

    ``accuracy`` over all items is the BEAR score: the mean over templates of the share of facts answered correctly.
    """
    by_template = items.group_by("wording").agg(pl.col("correct").mean()).sort("wording")
    templates = {f"template_{number}.accuracy": float(share) for number, share in by_template.iter_rows()}
    return cloze_metrics(items, top_k) | templates | wording_metrics(items)
