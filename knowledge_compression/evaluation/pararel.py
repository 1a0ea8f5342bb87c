"""ParaRel: facts asked in many paraphrases, and whether a model gives the same answer to all of them.

Elazar et al. 2021, "Measuring and Improving Consistency in Pretrained Language Models". As there, the answers of a
relation are its own objects, ranked uncalibrated; consistency is that of :mod:`~.wordings`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.calibration import Questions, sampled
from knowledge_compression.evaluation.cloze import Cloze, fill
from knowledge_compression.evaluation.probe import Probe, cloze_metrics
from knowledge_compression.evaluation.suite import Evaluation, Suite
from knowledge_compression.evaluation.wordings import wording_metrics
from knowledge_compression.heavy import pl
from knowledge_compression.identity import PLACE
from knowledge_compression.reading import objects

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring import Scorer

PATTERNS, FACTS = "pattern_data/graphs_json", "trex_lms_vocab"  # as in the authors' repository
READING = b"pararel 1"  # version of the code from files to questions; raised when it changes


@dataclass(frozen=True)
class ParaRel:
    """ParaRel as a suite, asked relation by relation, each fact in all of its relation's paraphrases.

    Attributes:
        data_dir: a folder that contains ``pararel/``.
        relations: the relations to ask; None asks all that have both patterns and facts.
        top_k: the k of the top-k metrics.
        limit: a random sample of at most this many facts, each in every paraphrase, among all objects of its relation.
    """

    data_dir: str | None = field(default=None, metadata=PLACE)
    relations: Sequence[str] | None = None
    top_k: Sequence[int] = (10,)
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuse the options that every cloze suite refuses."""
        self._probe()
        sampled([], self.limit)

    def fingerprint(self) -> str:
        """Digest of the files that are read; damaged files are refused here."""
        digest = hashlib.sha256(READING)
        for name in self._facts:
            for path in self._files(name):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]

    def check_data(self) -> None:
        """Refuse missing data."""
        _ = self._facts

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask every fact in every paraphrase."""
        return self.joined({name: part.evaluate(scorer) for name, part in self.parts().items()})

    def parts(self) -> dict[str, Suite]:
        """One suite for each relation."""
        asked = sampled([(name, fact) for name, facts in self._facts.items() for fact in facts], self.limit)
        chosen: dict[str, list[Cloze]] = {}
        for name, wordings in asked:
            chosen.setdefault(name, []).extend(wordings)
        return {
            name: _OneRelation(self._probe(), Questions(clozes, {name: self._objects(name)}))
            for name, clozes in chosen.items()
        }

    def joined(self, parts: Mapping[str, Evaluation]) -> Evaluation:
        """The answers of all relations, and their metrics."""
        items = pl.concat([part.items for part in parts.values()])
        left_out: dict[str, dict[str, int]] = {}
        for part in parts.values():
            for reason, of in part.description["left_out"].items():
                left_out.setdefault(reason, {}).update(of)
        described: dict[str, Any] = {
            "facts": self.fingerprint(),
            "limit": self.limit,
            "relations": list(parts),
            "left_out": left_out,
            "duplicates_dropped": sum(self._duplicates.values()),
        }
        fallbacks = [fallback for part in parts.values() for fallback in part.fallbacks]
        not_finite = sum(part.not_finite for part in parts.values())
        if not_finite:
            counts = {"items": float(items.height), "not_finite": float(not_finite)}
            return Evaluation(counts, items, described, fallbacks, not_finite)
        first = items.filter(pl.col("wording") == "0")["correct"].mean() or 0.0
        metrics = cloze_metrics(items, self.top_k) | {"first_wording.accuracy": float(first)}  # type: ignore[arg-type]
        return Evaluation(metrics | wording_metrics(items), items, described, fallbacks)

    def _probe(self) -> Probe:
        return Probe("typed", top_k=tuple(self.top_k))

    def _objects(self, name: str) -> list[str]:
        return sorted({wordings[0].gold for wordings in self._facts[name]})

    @cached_property
    def _folder(self) -> Path:
        folder = Path(self.data_dir or "").expanduser() / "pararel"
        if self.data_dir is None or not (folder / PATTERNS).is_dir() or not (folder / FACTS).is_dir():
            raise DataUnavailable(
                f"eval=pararel reads a folder: data_dir=DIR with {PATTERNS} and {FACTS} of ParaRel's release in "
                f"DIR/pararel (github.com/yanaiela/pararel); data_dir={self.data_dir} has none"
            )
        return folder

    def _files(self, name: str) -> tuple[Path, Path]:
        return self._folder / PATTERNS / f"{name}.jsonl", self._folder / FACTS / f"{name}.jsonl"

    @cached_property
    def _facts(self) -> dict[str, list[list[Cloze]]]:
        """The facts of each relation, each in its paraphrases."""
        patterned, with_facts = (
            {path.stem for path in (self._folder / of).glob("*.jsonl")} for of in (PATTERNS, FACTS)
        )
        there = sorted(patterned & with_facts, key=lambda name: (len(name), name))
        if unknown := [name for name in self.relations or () if name not in there]:
            raise BadInput(f"pararel has no relation '{unknown[0]}'; relations: {', '.join(there)}")
        found = {name: list(self._of(name)) for name in there if self.relations is None or name in self.relations}
        if not found:
            raise DataUnavailable(f"eval=pararel: {self._folder} has no relation with both patterns and facts")
        for name, facts in found.items():
            if len({wordings[0].gold for wordings in facts}) < 2:
                raise BadInput(f"{self._files(name)[1]}: {name} has fewer than two answers to choose between")
        return found

    def _of(self, name: str) -> Iterator[list[Cloze]]:
        patterns = self._patterns(name)
        path = self._files(name)[1]
        seen: dict[str, str] = {}
        self._duplicates[name] = 0
        for number, row in objects(path, "ParaRel's facts, one JSON object a line"):
            subject, gold = row.get("sub_label"), row.get("obj_label")
            if not isinstance(subject, str) or not isinstance(gold, str) or not subject or not gold:
                raise BadInput(f"{path}:{number}: needs the texts sub_label and obj_label")
            key = f"{name}/{row.get('uuid') or f'{subject}/{gold}'}"
            if key in seen:
                if seen[key] != gold:
                    raise BadInput(f"{path}:{number}: {key} has two answers, {seen[key]} and {gold}")
                self._duplicates[name] += 1
                continue
            seen[key] = gold
            yield [
                Cloze(name, f"{key}/{n}", key, subject, gold, fill(pattern, subject), str(n))
                for n, pattern in enumerate(patterns)
            ]

    @cached_property
    def _duplicates(self) -> dict[str, int]:
        return {}

    def _patterns(self, name: str) -> list[str]:
        path = self._files(name)[0]
        patterns = []
        for number, row in objects(path, "ParaRel's patterns, one JSON object a line"):
            pattern = row.get("pattern")
            if not isinstance(pattern, str) or "[X]" not in pattern or pattern.count("[Y]") != 1:
                raise BadInput(f"{path}:{number}: needs a pattern with [X], and [Y] once")
            patterns.append(pattern)
        if not patterns:
            raise BadInput(f"{path}: no pattern")
        return list(dict.fromkeys(patterns))


@dataclass(frozen=True)
class _OneRelation:
    probe: Probe
    questions: Questions

    def evaluate(self, scorer: Scorer) -> Evaluation:
        return self.probe.ask("pararel", scorer, self.questions)
