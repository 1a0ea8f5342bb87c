"""A set of answers made elsewhere, before it becomes a run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import DataUnavailable
from knowledge_compression.taking.said import Made

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Answers:
    """The answers of one model.

    Attributes:
        made: how the model was made; its ``model`` is a name.
        suite: the name of the set of questions.
        items: one row per item, in the item schema.
        asked: how the questions were asked; only answers asked in the same way are compared.
        tool: the program that wrote the files, e.g. ``lm-eval 0.4.13``.
        files: SHA-256 of every file that was read, by its path relative to the imported folder.
        notes: what was left out, with counts.
    """

    made: Made
    suite: str
    items: pl.DataFrame
    asked: dict[str, Any]
    tool: str
    files: dict[str, str]
    notes: list[str] = field(default_factory=list)


def digests(paths: list[Path], root: Path) -> dict[str, str]:
    """SHA-256 of files, by their paths from a folder."""
    found = {}
    for path in paths:
        try:
            with path.open("rb") as file:
                name = str(path.relative_to(root)) if path.is_relative_to(root) else path.name
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataUnavailable(f"{path} cannot be read ({error.strerror})") from None
    return found
