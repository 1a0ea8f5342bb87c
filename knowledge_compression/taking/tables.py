"""Tables of items and answers in CSV or JSON, read by a mapping that the user states; nothing is guessed from names."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from knowledge_compression.errors import BadInput, first_line
from knowledge_compression.evaluation.suite import ITEM_COLUMNS, item_table
from knowledge_compression.heavy import pl
from knowledge_compression.reading import objects, parsed, text_of
from knowledge_compression.taking.answers import Answers, digests
from knowledge_compression.taking.said import Made, Questions, Statement

Columns = dict[str, list[Any]]
SUITE = "table"
OF_RUN = ("model", "made")  # columns that say whose answer it is
PROBABILITIES = {"probability": "log_prob", "prediction_probability": "prediction_log_prob"}
KNOWN = (*(name for name in ITEM_COLUMNS if name != "suite"), *PROBABILITIES, *OF_RUN)
_OF_QUESTION = ("task", "id", "prompt", "gold", "choices")
_RIGHT = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def read_tables(root: Path, said: Statement, where: str, made: Made | None) -> list[Answers]:
    """The answers in the files that a statement names.

    Args:
        root: the folder, or the one file, that the user named.
        said: the mapping.
        where: the file of the mapping, for messages.
        made: how the model was made if the table does not say it.

    Raises:
        BadInput: a column is missing, a value is not possible, or an item appears twice.
    """
    folder = root if root.is_dir() else root.parent
    files = _files(root, said, where)
    _check_mapping(said, where)
    asked = _Questions(folder, said.questions, said.suite or SUITE)
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for file in files:
        columns = _chosen(read_columns(file), said.columns, file, where)
        count = len(next(iter(columns.values()), []))
        columns |= {name: [value] * count for name, value in said.fixed.items()}
        for number, row in enumerate(_rows(columns), 1):
            key = _text(row.pop("model", None)) or "", _text(row.pop("made", None)) or ""
            try:
                if not said.in_order and _text(row["id"]) is None:  # a blank line, too, is a row without values
                    raise ValueError("it has no id")
                rows[key].append(_item(row, said.suite or SUITE))
            except ValueError as error:
                raise BadInput(f"{file}, row {number}: {error}") from None
    if not rows:
        raise BadInput(f"{files[0]} holds no answers" + (f", nor do {len(files) - 1} more files" if files[1:] else ""))
    read = digests([*files, *asked.files], folder)
    reading = _Reading(said, where, made, asked, read)
    return [reading.answers(*key, items) for key, items in sorted(rows.items())]


def read_columns(path: Path, keys: str | None = None) -> Columns:
    """A table in a file: CSV with a header, JSON lines, a JSON list of objects, or a JSON object of columns.

    Args:
        path: the file.
        keys: the outermost keys of a JSON object are the values of this column, and the values are lists of objects.

    Raises:
        BadInput: it is none of these.
    """
    if path.suffix == ".csv":
        text = text_of(path, "a CSV file")
        try:
            heads = Counter(next(csv.reader(io.StringIO(text)), []))
            table = pl.read_csv(text.encode(), infer_schema=False)
        except (pl.exceptions.PolarsError, csv.Error) as error:
            raise BadInput(f"{path}: not CSV ({first_line(error)})") from None
        if twice := [name for name, count in heads.items() if name and count > 1]:  # polars would rename the others
            raise BadInput(f"{path} has {heads[twice[0]]} columns {twice[0]}; give each a name of its own")
        return table.to_dict(as_series=False)
    if path.suffix == ".jsonl":
        return _columns([row for _, row in objects(path)], path)
    wanted = "a list of objects, or an object of columns"
    content = parsed(text_of(path, wanted), str(path), wanted)
    if keys is not None and isinstance(content, Mapping):
        lists = [(key, rows) for key, rows in content.items() if isinstance(rows, list)]
        content = [{**row, keys: key} for key, rows in lists for row in rows if isinstance(row, Mapping)]
    if isinstance(content, list):
        return _columns(content, path)
    if not isinstance(content, Mapping):
        raise BadInput(f"{path} is not a table; expected {wanted}")
    lengths = {len(value) for value in content.values() if isinstance(value, list)}
    if len(lengths) != 1:
        raise BadInput(
            f"{path} has columns of {', '.join(map(str, sorted(lengths))) or 'no'} rows; all must have the same number"
        )
    count = lengths.pop()
    return {name: value if isinstance(value, list) else [value] * count for name, value in content.items()}


def _columns(rows: Sequence[Any], path: Path) -> Columns:
    if not all(isinstance(row, Mapping) for row in rows):
        raise BadInput(f"{path} is not a table; expected a list of objects")
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _rows(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _files(root: Path, said: Statement, where: str) -> list[Path]:
    if root.is_file():
        return [root]
    pattern = said.files
    if pattern is None:
        raise BadInput(f"{where}: files is missing; name the files with answers in {root}, e.g. answers_*.csv")
    try:
        found = sorted(path for path in root.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise BadInput(f"{where}: files={pattern} is not a pattern ({first_line(error)})") from None
    asked = root / said.questions.file if said.questions else None
    found = [path for path in found if path != asked]
    if not found:
        raise BadInput(f"{where}: {root} has no file {pattern}")
    return found


def _check_mapping(said: Statement, where: str) -> None:
    """Refuse a mapping that does not give items."""
    questions = said.questions.columns if said.questions else {}
    told = [*said.columns, *said.fixed, *questions]
    if unknown := [name for name in told if name not in KNOWN]:
        raise BadInput(f"{where}: {unknown[0]} is not a column of an item; choose one of {', '.join(KNOWN)}")
    if said.questions and (foreign := [name for name in questions if name not in _OF_QUESTION]):
        raise BadInput(f"{where}: questions.columns.{foreign[0]} is not a column of a question")
    if said.in_order == ("id" in said.columns) or (said.in_order and not said.questions):
        raise BadInput(f"{where}: columns needs id, or in_order: true if the answers follow the order of the questions")
    if "correct" not in told and not {"prediction", "gold"} <= set(told):
        raise BadInput(f"{where}: columns needs correct, or both prediction and gold")


def _chosen(columns: Columns, mapping: Mapping[str, str], file: Path, where: str) -> Columns:
    for name, column in mapping.items():
        if column not in columns:
            there = ", ".join(map(str, columns)) or "none"
            raise BadInput(f"{file} has no column {column}, which {where} gives for {name}; its columns are {there}")
    return {name: columns[column] for name, column in mapping.items()}


class _Questions:
    """The questions to which the answers belong, if they are in a file of their own."""

    def __init__(self, folder: Path, said: Questions | None, task: str) -> None:
        self.said, self.file = said, folder / said.file if said else None
        self.files = [self.file] if self.file else []
        self.by_task: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        if said is None or self.file is None:
            return
        columns = read_columns(self.file, said.keys)
        mapping = dict(said.columns) | ({said.keys: said.keys} if said.keys else {})
        for row in _rows(_chosen(columns, mapping, self.file, "the mapping")):
            name, key = _text(row.get("task")) or task, _text(row.get("id"))
            if key is None or key in self.by_task[name]:
                why = "a question has no id" if key is None else f"question {key} of {name} appears twice"
                raise BadInput(f"{self.file}: {why}")
            self.by_task[name][key] = {k: _text(v) for k, v in row.items()} | {"task": name, "id": key}

    def beside(self, items: list[dict[str, Any]], in_order: bool, whose: str) -> list[dict[str, Any]]:
        """Items with their questions."""
        if self.said is None:
            return items
        by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for item in items:
            by_task[item["task"]].append(item)
        found: list[dict[str, Any]] = []
        for task, answers in by_task.items():
            questions = self.by_task.get(task, {})
            if in_order and len(questions) != len(answers):
                raise BadInput(f"{whose} has {len(answers)} answers to the {len(questions)} questions of {task}")
            ids = list(questions) if in_order else [item["id"] for item in answers]
            if stray := [key for key in ids if key not in questions]:
                raise BadInput(f"{len(stray)} answers of {whose} in {task} have no question (the first: {stray[0]})")
            found += [item | questions[key] for key, item in zip(ids, answers, strict=True)]
        return found


@dataclass(frozen=True)
class _Reading:
    """The common state while the answers of one model after another are put together."""

    said: Statement
    where: str
    given: Made | None
    questions: _Questions
    files: dict[str, str]

    def answers(self, model: str, how: str, items: list[dict[str, Any]]) -> Answers:
        """The answers of one model, made in one way."""
        said, whose = self.said, f"{model} {how}".strip() or "the table"
        made = self._made(model, how)
        items = self.questions.beside(items, said.in_order, whose)
        counts = Counter((item["task"], item["id"]) for item in items)
        if twice := [item for item, count in counts.items() if count > 1]:
            raise BadInput(f"{len(twice)} items of {whose} appear twice (the first: {' '.join(map(str, twice[0]))})")
        for item in items:
            if item.get("correct") is None and None not in (item.get("prediction"), item.get("gold")):
                item["correct"] = item["prediction"] == item["gold"]
        unknown = sum(item.get("correct") is None for item in items)
        notes = [f"{unknown} items of {whose} lack an answer or a right one and are not counted"] if unknown else []
        suite = said.suite or SUITE
        return Answers(made, suite, item_table(items), {"from": "a table"}, "a table", self.files, notes)

    def _made(self, model: str, how: str) -> Made:
        made = self.said.made.get(how) if how else self.given
        if made is None:
            known = f"; it has {', '.join(self.said.made)}" if self.said.made else ""
            told = f"made lacks {how}{known}" if how else "a column made, or --compression NAME, is missing"
            raise BadInput(f"{self.where}: {told}")
        made = replace(made, model=model or made.model or (self.given.model if self.given else None))
        if not made.model:
            raise BadInput(
                f"{self.where}: the model has no name; give a column or a fixed value for it, or --model NAME"
            )
        return made


def _item(row: Mapping[str, Any], suite: str) -> dict[str, Any]:
    """One item, its values in the types of the item table."""
    item: dict[str, Any] = {"suite": suite, "task": suite}
    for name, value in row.items():
        if name in PROBABILITIES:
            item[PROBABILITIES[name]] = _log(value, name)
        elif (text := _text(value)) is not None:
            item[name] = _READ[ITEM_COLUMNS[name]](text, name)
    return item


def _text(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} is {text}, which is not a number") from None


def _whole(text: str, name: str) -> int:
    number = _number(text, name)
    if not (number.is_integer() and 1 <= number < 2**63):
        raise ValueError(f"{name} is {text}, which is not a whole number from 1 on")
    return int(number)


def _right(text: str, name: str) -> bool:
    if text.lower() not in _RIGHT:
        raise ValueError(f"{name} is {text}; give true, false, 1 or 0")
    return _RIGHT[text.lower()]


def _log(value: Any, name: str) -> float | None:
    if (text := _text(value)) is None:
        return None
    share = _number(text, name)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is {text}, which is not a share")
    return math.log(share) if share else -math.inf


_READ: Mapping[str, Callable[[str, str], Any]] = {
    "String": lambda text, _: text,
    "Boolean": _right,
    "Float64": _number,
    "Int64": _whole,
}
