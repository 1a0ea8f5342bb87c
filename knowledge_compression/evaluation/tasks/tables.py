"""Documents of lm-eval's tasks in comma-separated tables, written once as the JSON lines that lm-eval reads."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from knowledge_compression.cache import cached_folder
from knowledge_compression.errors import BadInput
from knowledge_compression.reading import text_of


def documents_of(path: Path, entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The documents of a table, line by line.

    Args:
        path: comma-separated values, with a header.
        entry: ``columns`` and ``numbers``, see ``tables.yaml``.

    Raises:
        BadInput: a column is missing, a row has too few or too many cells, or a cell that needs a number has none.
        DataUnavailable: the file cannot be read.
    """
    columns: Mapping[str, str | list[str]] = entry["columns"]
    needed = [name for of in columns.values() for name in ([of] if isinstance(of, str) else of)]
    reader = csv.DictReader(text_of(path, "a table with a header").splitlines(keepends=True), strict=True)
    try:
        if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
            raise BadInput(f"{path} has no column {missing[0]}; its header needs {','.join(needed)}")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise BadInput(f"{where}: the number of cells is not {len(reader.fieldnames or ())}, as in the header")
            document: dict[str, Any] = {
                field: row[of] if isinstance(of, str) else [row[name] for name in of] for field, of in columns.items()
            }
            for field in entry["numbers"]:
                if not str(document[field]).strip().isdecimal():
                    raise BadInput(f"{where}: {field}='{document[field]}' is not a whole number")
                document[field] = int(document[field])
            yield document
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num}: these are not comma-separated values ({error})") from None


def as_json_lines(path: Path, entry: Mapping[str, Any]) -> Path:
    """The table as JSON lines, in the user's cache."""
    digest = hashlib.sha256(json.dumps([entry["columns"], entry["numbers"]]).encode() + path.read_bytes()).hexdigest()

    def make(folder: Path) -> None:
        lines = "".join(json.dumps(document) + "\n" for document in documents_of(path, entry))
        (folder / "documents.jsonl").write_text(lines, encoding="utf-8")

    return cached_folder(f"tables/{digest[:32]}", make) / "documents.jsonl"
