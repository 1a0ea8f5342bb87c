"""Where LAMA's facts come from: a folder in the original layout, or the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.cloze import MASK
from knowledge_compression.reading import objects, text_of

# The files of each data set, as the authors' data.zip has them.
LAYOUT: Mapping[str, str] = {
    "TREx": "TREx/*.jsonl",
    "Google_RE": "Google_RE/*_test.jsonl",
    "Squad": "Squad/test.jsonl",
    "ConceptNet": "ConceptNet/test.jsonl",
}
_WANTED = "LAMA has one object a line"
HUB_ID = "facebook/lama"
HUB_REVISION = "refs/convert/parquet"  # the data as Parquet; the main branch is a script, which nobody should run


@dataclass(frozen=True)
class Fact:
    """One line of LAMA.

    Attributes:
        dataset, relation: e.g. ``TREx`` and ``P19``; the relation is empty where a data set is not divided.
        id: its name in the files.
        subject, gold: labels of the subject and of the object.
        sentence: the first of its sentences that has a ``[MASK]``; empty where it has none at all (T-REx without
            evidences can still be asked by template).
    """

    dataset: str
    relation: str
    id: str
    subject: str
    gold: str
    sentence: str

    @property
    def task(self) -> str:
        """The relation's name over all data sets."""
        return f"{self.dataset}.{self.relation}" if self.relation else self.dataset


@dataclass(frozen=True)
class LamaFolder:
    """LAMA in its original layout."""

    folder: Path

    def has(self, dataset: str) -> bool:
        """Whether a data set's files are there."""
        return any(self.folder.glob(LAYOUT[dataset]))

    def why_nothing(self, datasets: Sequence[str]) -> str:
        """The line for the user when none is there."""
        wanted = ", ".join(LAYOUT[name] for name in datasets)
        if not self.folder.is_dir():
            return f"there is no folder {self.folder}; data_dir needs a lama folder with {wanted}"
        return f"{self.folder} holds none of {wanted}"

    def files(self, datasets: Sequence[str]) -> list[Path]:
        """Every file that decides the questions of ``datasets``, in a fixed order."""
        beside = [self.folder / name for name in ("relations.jsonl", "common_vocab_cased.txt")]
        facts = [path for name in datasets for path in sorted(self.folder.glob(LAYOUT[name]))]
        return [path for path in beside if path.is_file()] + facts

    def facts(self, dataset: str) -> Iterator[Fact]:
        """The facts of a data set, file by file.

        Raises:
            BadInput: a line is not JSON, lacks a field, or its sentences have no mask.
        """
        for path in sorted(self.folder.glob(LAYOUT[dataset])):
            # Google-RE and T-REx have a file a relation; the other two are one file.
            relation = path.stem.removesuffix("_test") if "*" in LAYOUT[dataset] else ""
            for number, record in objects(path, _WANTED):
                where = f"{path}:{number}"
                yield _fact(dataset, relation, record, _sentences(record, where), where=where, number=number)

    def templates(self) -> dict[str, str]:
        """T-REx's template of each relation."""
        path = self.folder / "relations.jsonl"
        if not path.is_file():
            raise DataUnavailable(f"eval=lama: T-REx's templates are not at {path}; add it, or take protocol=sentence")
        templates = {}
        for number, record in objects(path, _WANTED):
            if "[X]" not in str(record.get("template")) or "[Y]" not in str(record.get("template")):
                raise BadInput(f"{path}:{number}: needs a relation and a template with [X] and [Y]")
            templates[str(record.get("relation"))] = str(record["template"])
        return templates

    def common_words(self) -> list[str]:
        """The words that all of LAMA's original models have."""
        path = self.folder / "common_vocab_cased.txt"
        if not path.is_file():
            raise DataUnavailable(
                f"eval=lama: candidates=common reads {path}, which is not there; give it, or use full"
            )
        return [word for word in text_of(path, "one word a line").splitlines() if word]


@dataclass(frozen=True)
class LamaHub:
    """LAMA from the Hugging Face hub, or its local cache."""

    hub_id: str
    revision: str

    def has(self, dataset: str) -> bool:
        """Whether the hub (or the cache) gives a data set."""
        return dataset in self._tables

    def why_nothing(self, datasets: Sequence[str]) -> str:
        """The line for the user when none is there."""
        return (
            f"{self.hub_id} is not cached and the hub did not give {', '.join(datasets)} ({self._refused}); "
            "give local files with data_dir=DIR, where DIR/lama is in LAMA's original layout"
        )

    def facts(self, dataset: str) -> Iterator[Fact]:
        """The facts of a data set, the first evidence of each."""
        seen = set()
        for number, record in enumerate(self._tables[dataset]):
            relation = str(record.get("predicate_id") or "")
            if dataset == "Google_RE":
                relation = str(record["pred"]).rpartition("/")[2]
            name = str(record.get("uuid") or record.get("id") or number)
            if (relation, name) not in seen:
                seen.add((relation, name))
                where = f"{self.hub_id} {dataset} row {number}"
                sentences = [str(record.get("masked_sentence"))]
                yield _fact(dataset, relation, record, sentences, where=where, number=number)

    def templates(self) -> dict[str, str]:
        """T-REx's template of each relation, which its rows repeat."""
        return {str(record["predicate_id"]): str(record["template"]) for record in self._tables["TREx"]}

    def common_words(self) -> list[str]:
        """Not on the hub."""
        raise DataUnavailable(
            "eval=lama: candidates=common reads lama/common_vocab_cased.txt, which the hub lacks; give data_dir=DIR"
        )

    def files(self, datasets: Sequence[str]) -> list[Path]:
        """No local files decide the questions."""
        return []

    @cached_property
    def _loaded(self) -> tuple[dict[str, Iterable[dict[str, Any]]], str]:
        from datasets import load_dataset

        tables, refused = {}, ""
        for dataset in LAYOUT:
            where = f"hf://datasets/{self.hub_id}@{self.revision.replace('/', '%2F')}/{dataset.lower()}/*/*.parquet"
            try:
                tables[dataset] = load_dataset("parquet", data_files=where, split="train")
            except Exception as error:  # the hub client raises a dozen kinds; all mean that it cannot be had
                refused = next(iter(str(error).splitlines()), "") or type(error).__name__
        return tables, refused[:160]

    @property
    def _tables(self) -> dict[str, Iterable[dict[str, Any]]]:
        return self._loaded[0]

    @property
    def _refused(self) -> str:
        return self._loaded[1]


def _sentences(record: Mapping[str, Any], where: str) -> list[str]:
    """The masked sentences of a line, wherever its data set keeps them.

    Raises:
        BadInput: they are not kept as any data set keeps them.
    """
    try:
        if "masked_sentences" in record:
            return [str(sentence) for sentence in list(record["masked_sentences"])]
        return [str(evidence.get("masked_sentence", "")) for evidence in record.get("evidences", ())]
    except (TypeError, AttributeError):
        raise BadInput(f"{where}: no list under masked_sentences, or of objects under evidences") from None


def _fact(
    dataset: str, relation: str, record: Mapping[str, Any], sentences: Sequence[str], *, where: str, number: int
) -> Fact:
    masked = next((sentence for sentence in sentences if MASK in sentence), "")
    if not masked and (sentences or dataset != "TREx"):
        raise BadInput(f"{where}: no {MASK} in its sentences; the object's place must be marked by {MASK}")
    if not record.get("obj_label"):
        raise BadInput(f"{where}: no obj_label, the right answer")
    subject = str(record.get("sub_label") or record.get("sub") or "")
    name = str(record.get("uuid") or record.get("id") or number)
    return Fact(dataset, relation, name, subject, str(record["obj_label"]), masked)
