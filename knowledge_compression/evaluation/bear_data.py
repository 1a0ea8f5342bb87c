"""BEAR's facts, in the layout of its authors' release (Wiland, Ploner & Akbik 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.reading import objects, parsed, text_of

METADATA, LITE = "metadata_relations.json", "bear_lite_indices.json"
_WANTED = "BEAR's facts, one JSON object a line"


@dataclass(frozen=True)
class BearFact:
    """A subject and its answer, with an identifier that is unique within its relation."""

    id: str
    subject: str
    gold: str


@dataclass(frozen=True)
class BearRelation:
    """A relation.

    Attributes:
        name: e.g. ``P30``.
        templates: sentences with ``[X]`` and ``[Y]``.
        answers: the candidate answers.
        facts: its facts, each once.
        duplicates: number of lines that repeat a fact.
    """

    name: str
    templates: Sequence[str]
    answers: Sequence[str]
    facts: Sequence[BearFact]
    duplicates: int


@dataclass(frozen=True)
class BearFolder:
    """A data set: ``P*.jsonl`` and ``metadata_relations.json`` in ``folder``.

    Attributes:
        folder: the folder.
        lite: take only the facts of ``bear_lite_indices.json``, which lies beside the folder, and their answers.
    """

    folder: Path
    lite: bool = False

    def files(self, names: Sequence[str]) -> list[Path]:
        """Every file that decides the questions of these relations."""
        lite = [self.folder.parent / LITE] if self.lite else []
        return [self.folder / METADATA, *lite, *(self.folder / f"{name}.jsonl" for name in names)]

    def names(self) -> list[str]:
        """The names of all relations, in the order of the metadata.

        Raises:
            DataUnavailable: there is no such folder.
        """
        return list(self._metadata())

    def relation(self, name: str) -> BearRelation:
        """A relation with its facts.

        Raises:
            BadInput: it is not in this layout, has fewer than two answers, lacks the right answer of a fact, or has
                fewer facts than the indices of BEAR-lite need.
        """
        path, metadata = self.folder / f"{name}.jsonl", self._metadata()[name]
        templates, labels = (
            _texts(metadata, "templates", name, self.folder),
            _texts(metadata, "answer_space_labels", name, self.folder),
        )
        if wrong := [one for one in templates if one.count("[Y]") != 1 or "[X]" not in one]:
            raise BadInput(f"{self.folder / METADATA}: {name}: template '{wrong[0]}' needs [X], and [Y] once")
        rows = [(f"{path}:{number}", row) for number, row in objects(path, _WANTED)]
        found: dict[str, BearFact] = {}
        duplicates = 0
        for where, row in self._chosen(name, rows):
            fact = _fact(where, row, labels)
            if (before := found.setdefault(fact.id, fact)) is not fact:
                duplicates += 1
                if before.gold != fact.gold:
                    raise BadInput(
                        f"{where}: {fact.subject} ({fact.id}) has two answers, {before.gold} and {fact.gold}"
                    )
        if self.lite:  # as in the reference implementation: only the answers of the remaining facts
            labels = list(dict.fromkeys(fact.gold for fact in found.values()))
        answers = list(dict.fromkeys(labels))
        if len(answers) < 2:
            raise BadInput(f"{path}: relation {name} has fewer than two answers, so there is nothing to choose between")
        return BearRelation(name, templates, answers, list(found.values()), duplicates)

    def _chosen(self, name: str, rows: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
        if not self.lite:
            return rows
        path = self.folder.parent / LITE
        indices = _object(path).get(name)
        if not isinstance(indices, list) or not all(isinstance(i, int) and i >= 0 for i in indices):
            raise BadInput(f"{path} has no list of line numbers for {name}")
        if indices and max(indices) >= len(rows):
            raise BadInput(
                f"{path} refers to line {max(indices)} of {name}, and {self.folder}/{name}.jsonl has only "
                f"{len(rows)}: these "
                "indices choose from BEAR-big (eval.bear.dataset=BEAR-big); drop eval.bear.lite with other data"
            )
        return [rows[i] for i in indices]

    def _metadata(self) -> dict[str, Any]:
        path = self.folder / METADATA
        if not path.is_file():
            raise DataUnavailable(
                f"eval=bear: {path} does not exist; set data_dir=DIR with BEAR's release in "
                f"DIR/bear/{self.folder.name} "
                "(github.com/lm-pub-quiz/BEAR)"
            )
        return _object(path)


def _object(path: Path) -> dict[str, Any]:
    found = parsed(text_of(path, "a JSON object"), str(path), "a JSON object")
    if not isinstance(found, dict):
        raise BadInput(f"{path}: not a JSON object")
    return found


def _texts(metadata: Any, key: str, name: str, folder: Path) -> list[str]:
    texts = metadata.get(key) if isinstance(metadata, Mapping) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise BadInput(f"{folder / METADATA}: {name} has no list of {key}")
    return texts


def _fact(where: str, row: Mapping[str, Any], answers: Sequence[str]) -> BearFact:
    subject, gold = row.get("sub_label"), row.get("obj_label")
    if not isinstance(subject, str) or not subject or not isinstance(gold, str):
        raise BadInput(f"{where}: needs the texts sub_label and obj_label")
    if gold not in answers:
        raise BadInput(
            f"{where}: the answer '{gold}' is not among the {len(answers)} answers of its relation ({METADATA})"
        )
    return BearFact(str(row.get("sub_id") or subject), subject, gold)
