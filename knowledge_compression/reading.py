"""Reading the user's text, JSON and YAML files; a failure is one line that names the file and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from knowledge_compression.errors import BadInput, DataUnavailable, first_line

_DEEPEST = 100  # levels of YAML


def text_of(path: Path, wanted: str) -> str:
    """A UTF-8 file as text, without a byte-order mark.

    Args:
        path: the file.
        wanted: the expected content, for the message, e.g. ``a text file``.

    Raises:
        DataUnavailable: there is no such file, or it may not be read.
        BadInput: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataUnavailable(f"{path} cannot be read ({error.strerror}); expected {wanted}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start}); expected {wanted}, in UTF-8") from None


def yaml_of(text: str) -> Any:
    """Parse YAML of limited depth: libyaml's composer recurses once per level, without a limit of its own.

    Raises:
        ValueError, yaml.YAMLError: it is nested too deeply, or is not YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    return yaml.load(text, Loader=yaml.CSafeLoader)


def parsed(text: str, where: str, wanted: str) -> Any:
    """Parse JSON.

    Args:
        text: the JSON.
        where: its place, for the message, e.g. a file and a line number.
        wanted: the expected content, e.g. ``one object per line``.

    Raises:
        BadInput: it is not JSON, or is nested more deeply or has longer numbers than Python reads.
    """
    try:
        found = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # half a character, where a program cut a text, becomes a question mark
            found = json.loads(json.dumps(found, ensure_ascii=False).encode(errors="replace"))
        return found
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON ({error.msg} at column {error.colno}); expected {wanted}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: unreadable JSON ({first_line(error)}); expected {wanted}") from None


def numbered_lines(path: Path, wanted: str) -> Iterator[tuple[int, str]]:
    """The non-empty lines of a file, each with its number from 1.

    Raises:
        DataUnavailable, BadInput: as :func:`text_of`.
    """
    lines = text_of(path, wanted).split("\n")  # and not at other line separators, which JSON strings may contain
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def objects(path: Path, wanted: str = "one JSON object per line") -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with one JSON object per line, each with its line number.

    Raises:
        DataUnavailable, BadInput: as :func:`text_of`; or a line is not a JSON object.
    """
    for number, line in numbered_lines(path, wanted):
        found = parsed(line, f"{path}:{number}", wanted)
        if not isinstance(found, dict):
            raise BadInput(f"{path}:{number}: not a JSON object; expected {wanted}")
        yield number, found
