"""Rows of a data set: a local file (JSON lines, comma- or tab-separated), or the hub."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_compression.errors import BadInput, DataUnavailable, first_line
from knowledge_compression.reading import objects, text_of

_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Source:
    """Where a data set lies.

    Attributes:
        suite: its name in messages.
        data_dir: the user's folder; None reads the hub.
        names: names that its file may have under ``data_dir``, the first that is there is read.
        columns: the columns that every row needs.
        hub_id: the data set on the hub.
        revision: its revision there.
    """

    suite: str
    data_dir: str | None
    names: Sequence[str]
    columns: Sequence[str]
    hub_id: str
    revision: str = "main"

    def path(self) -> Path:
        """The local file.

        Raises:
            DataUnavailable: there is none.
        """
        root = Path(self.data_dir or "").expanduser()
        found = next((root / name for name in self.names if (root / name).is_file()), None)
        if found is None:
            raise DataUnavailable(f"eval={self.suite}: data_dir={self.data_dir} has none of {', '.join(self.names)}")
        return found

    def digest(self, reading: str) -> str:
        """Digest of the file, or the hub's id and revision."""
        if self.data_dir is None:
            return f"{self.hub_id}@{self.revision}:{reading}"
        return hashlib.sha256(reading.encode() + self.path().read_bytes()).hexdigest()[:16]

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows, each with its place for messages.

        Raises:
            BadInput: the file is damaged, or a row lacks a column.
            DataUnavailable: there is no such file, or the hub did not answer.
        """
        where = None
        for where, row in self._hub() if self.data_dir is None else _rows_of(self.path()):
            if missing := [name for name in self.columns if row.get(name) in (None, "")]:
                raise BadInput(f"{where}: no {missing[0]}; each row needs {', '.join(self.columns)}")
            yield where, row
        if where is None:
            raise BadInput(f"{self.hub_id if self.data_dir is None else self.path()}: no rows")

    def _hub(self) -> Iterator[tuple[str, dict[str, Any]]]:
        from datasets import load_dataset

        try:
            rows = load_dataset(self.hub_id, split="test", revision=self.revision)
        except Exception as error:  # datasets and the hub raise many kinds of error; all mean that there are no rows
            raise DataUnavailable(
                f"eval={self.suite}: {self.hub_id} could not be loaded ({first_line(error)}); give local files with "
                f"data_dir=DIR ({', '.join(self.names)})"
            ) from error
        for number, row in enumerate(rows):
            yield f"{self.hub_id}:{number}", dict(row)


def _rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    delimiter = _DELIMITERS.get(path.suffix)
    if delimiter is None:
        yield from ((f"{path}:{number}", row) for number, row in objects(path))
        return
    reader = csv.DictReader(
        io.StringIO(text_of(path, "a table with a header"), newline=""), delimiter=delimiter, strict=True
    )
    try:
        for row in reader:
            if None in row or None in row.values():
                raise BadInput(f"{path}:{reader.line_num}: not {len(reader.fieldnames or ())} cells as in the header")
            yield f"{path}:{reader.line_num}", dict(row)
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num}: not a table ({error})") from None
