"""Sources of LAMA's facts: a folder in the original layout, or the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.cloze import MASK
from knowledge_compression.reading import objects, text_of

# The files of each data set, as in the authors' data.zip.
LAYOUT: Mapping[str, str] = {
    "TREx": "TREx/*.jsonl",
    "Google_RE": "Google_RE/*_test.jsonl",
    "Squad": "Squad/test.jsonl",
    "ConceptNet": "ConceptNet/test.jsonl",
}
# The authors' templates for Google-RE, which are in their code and not in a file (Petroni et al. 2019).
GOOGLE_RE = {
    "place_of_birth": "[X] was born in [Y] .",
    "date_of_birth": "[X] (born [Y]).",
    "place_of_death": "[X] died in [Y] .",
}
_WANTED = "LAMA's facts, one JSON object per line"
_MASKS = re.compile(
    r"\[mask\]|<mask>|<extra_id_\d+>", re.IGNORECASE
)  # the mask of BERT, of RoBERTa and BART, and of T5
HUB_ID = "facebook/lama"
HUB_REVISION = "refs/convert/parquet"  # the data as Parquet; the main branch is a script, which must not be run


@dataclass(frozen=True)
class Fact:
    """One line of LAMA.

    Attributes:
        dataset, relation: e.g. ``TREx`` and ``P19``; the relation is empty if a data set has none.
        id: its identifier in the files.
        subject, gold: labels of the subject and of the object.
        sentence: the first of its sentences with a ``[MASK]`` (other models' masks are rewritten to it); empty if there
            is none (T-REx without evidences can still be asked by template).
    """

    dataset: str
    relation: str
    id: str
    subject: str
    gold: str
    sentence: str

    @property
    def task(self) -> str:
        """The relation's name, unique over all data sets."""
        return f"{self.dataset}.{self.relation}" if self.relation else self.dataset


@dataclass(frozen=True)
class LamaFolder:
    """LAMA in its original layout."""

    folder: Path

    def has(self, dataset: str) -> bool:
        """Whether a data set's files exist."""
        return any(self.folder.glob(LAYOUT[dataset]))

    def why_nothing(self, datasets: Sequence[str]) -> str:
        """The error message when none is available."""
        wanted = ", ".join(LAYOUT[name] for name in datasets)
        if not self.folder.is_dir():
            return f"the folder {self.folder} does not exist; data_dir needs a folder lama with {wanted}"
        return f"{self.folder} holds none of {wanted}"

    def files(self, datasets: Sequence[str]) -> list[Path]:
        """Every file that decides the questions of ``datasets``, in a fixed order."""
        beside = [self.folder / name for name in ("relations.jsonl", "common_vocab_cased.txt")]
        facts = [path for name in datasets for path in sorted(self.folder.glob(LAYOUT[name]))]
        return [path for path in beside if path.is_file()] + facts

    def facts(self, dataset: str) -> Iterator[Fact]:
        """Yield the facts of a data set, file by file.

        Raises:
            BadInput: a line is not JSON, lacks a field, or its sentences have no mask.
        """
        return _facts(dataset, self._rows(dataset))

    def _rows(self, dataset: str) -> Iterator[_Row]:
        for path in sorted(self.folder.glob(LAYOUT[dataset])):
            # Google-RE and T-REx have one file per relation; the other two are one file.
            relation = path.stem.removesuffix("_test") if "*" in LAYOUT[dataset] else ""
            for number, record in objects(path, _WANTED):
                yield _Row(relation, record, f"{path}:{number}", number)

    def templates(self) -> dict[str, str]:
        """T-REx's template of each relation."""
        path = self.folder / "relations.jsonl"
        if not path.is_file():
            raise DataUnavailable(
                f"eval=lama: T-REx's templates are missing ({path}); add the file, or choose protocol=sentence"
            )
        templates = {}
        for number, record in objects(path, _WANTED):
            if "[X]" not in str(record.get("template")) or "[Y]" not in str(record.get("template")):
                raise BadInput(f"{path}:{number}: needs a relation and a template with [X] and [Y]")
            templates[str(record.get("relation"))] = str(record["template"])
        return templates

    def common_words(self) -> list[str]:
        """The words in the vocabularies of all of LAMA's original models."""
        path = self.folder / "common_vocab_cased.txt"
        if not path.is_file():
            raise DataUnavailable(
                f"eval=lama: candidates=common reads {path}, which does not exist; add it, or choose candidates=full"
            )
        return [word for word in text_of(path, "one word a line").splitlines() if word]


@dataclass(frozen=True)
class LamaHub:
    """LAMA from the Hugging Face hub, or its local cache."""

    hub_id: str
    revision: str

    def has(self, dataset: str) -> bool:
        """Whether the hub, or its cache, has a data set."""
        return dataset in self._tables

    def why_nothing(self, datasets: Sequence[str]) -> str:
        """The error message when none is available."""
        return (
            f"{self.hub_id} is not in the cache, and the hub did not provide {', '.join(datasets)} ({self._refused}); "
            "give local files with data_dir=DIR, where DIR/lama is in LAMA's original layout"
        )

    def facts(self, dataset: str) -> Iterator[Fact]:
        """Yield the facts of a data set, whose rows hold one evidence each."""
        return _facts(dataset, self._rows(dataset))

    def _rows(self, dataset: str) -> Iterator[_Row]:
        for number, record in enumerate(self._tables[dataset]):
            relation = str(record.get("predicate_id") or "") if dataset == "TREx" else ""
            if dataset == "Google_RE":
                relation = str(record["pred"]).rpartition("/")[2]
            yield _Row(relation, record, f"{self.hub_id} {dataset} row {number}", number)

    def templates(self) -> dict[str, str]:
        """T-REx's template of each relation, which its rows repeat."""
        return {str(record["predicate_id"]): str(record["template"]) for record in self._tables["TREx"]}

    def common_words(self) -> list[str]:
        """Raises: the hub does not have them."""
        raise DataUnavailable(
            "eval=lama: candidates=common reads lama/common_vocab_cased.txt, which the hub lacks; give data_dir=DIR"
        )

    def files(self, datasets: Sequence[str]) -> list[Path]:
        """Empty, because no local files decide the questions."""
        return []

    @cached_property
    def _loaded(self) -> tuple[dict[str, Iterable[dict[str, Any]]], str]:
        from datasets import load_dataset

        tables, refused = {}, ""
        for dataset in LAYOUT:
            where = f"hf://datasets/{self.hub_id}@{self.revision.replace('/', '%2F')}/{dataset.lower()}/*/*.parquet"
            try:
                tables[dataset] = load_dataset("parquet", data_files=where, split="train")
            except Exception as error:  # the hub client raises a dozen kinds of error; all mean that it is unavailable
                refused = next(iter(str(error).splitlines()), "") or type(error).__name__
        return tables, refused[:160]

    @property
    def _tables(self) -> dict[str, Iterable[dict[str, Any]]]:
        return self._loaded[0]

    @property
    def _refused(self) -> str:
        return self._loaded[1]


@dataclass(frozen=True)
class _Row:
    """A line or row, its relation, its place for messages, and its number there."""

    relation: str
    record: Mapping[str, Any]
    where: str
    number: int


def _facts(dataset: str, rows: Iterable[_Row]) -> Iterator[Fact]:
    """Yield the facts in the order in which they first appear.

    If rows hold one ``masked_sentence`` each, rows with the same id are the evidences of one fact. Otherwise they are
    several facts, and the id of each but the first is followed by the row's number.

    Raises:
        BadInput: a row lacks a field, or none of its sentences has a mask.
    """
    waiting: dict[tuple[str, str], tuple[_Row, str]] = {}  # facts whose sentences are spread over several rows
    seen: set[tuple[str, str]] = set()
    for row in rows:
        sentences = _sentences(row)
        masked = next((sentence for sentence in sentences if MASK in sentence), "")
        key = (row.relation, _name(row))
        if "masked_sentence" not in row.record:
            fact = _fact(dataset, row, masked, has_sentences=bool(sentences))
            yield replace(fact, id=f"{fact.id}:{row.number}") if key in seen else fact
            seen.add(key)
            continue
        if key not in waiting or (masked and not waiting[key][1]):
            waiting[key] = (waiting.get(key, (row, ""))[0], masked)
    for row, masked in waiting.values():
        yield _fact(dataset, row, masked, has_sentences=True)


def _sentences(row: _Row) -> list[str]:
    """The masked sentences of a row, from the field that its data set uses, with one kind of mask.

    Raises:
        BadInput: no data set uses any of its fields.
    """
    record = row.record
    try:
        if "masked_sentences" in record:
            found = list(record["masked_sentences"])
        elif "masked_sentence" in record:
            found = [record["masked_sentence"]]
        else:
            found = [evidence.get("masked_sentence", "") for evidence in record.get("evidences", ())]
    except (TypeError, AttributeError):
        raise BadInput(
            f"{row.where}: neither masked_sentences nor evidences holds the list that LAMA's format needs"
        ) from None
    return [sentence if MASK in sentence else _MASKS.sub(MASK, sentence) for sentence in map(str, found)]


def _name(row: _Row) -> str:
    return str(row.record.get("uuid") or row.record.get("id") or row.number)


def _fact(dataset: str, row: _Row, masked: str, *, has_sentences: bool) -> Fact:
    if not masked and (has_sentences or dataset != "TREx"):
        raise BadInput(f"{row.where}: its sentences have no {MASK}, which must mark the object's place")
    if not row.record.get("obj_label"):
        raise BadInput(f"{row.where}: obj_label, the right answer, is missing")
    subject = str(row.record.get("sub_label") or row.record.get("sub") or "")
    return Fact(dataset, row.relation, _name(row), subject, str(row.record["obj_label"]), masked)
