"""Text and JSON from files of the user's: what cannot be read is one line that names the file and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from knowledge_compression.errors import BadInput, DataUnavailable, first_line


def text_of(path: Path, wanted: str) -> str:
    """A UTF-8 file as text, without the mark that some editors set before it.

    Args:
        path: the file.
        wanted: what it should be, for the message, e.g. ``a text file``.

    Raises:
        DataUnavailable: there is no such file, or it may not be read.
        BadInput: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataUnavailable(f"{path} cannot be read ({error.strerror}); give {wanted}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start}); give {wanted} in UTF-8") from None


def parsed(text: str, where: str, wanted: str) -> Any:
    """What JSON says.

    Args:
        text: the JSON.
        where: its place, for the message, e.g. a file and a line's number.
        wanted: what it should be, e.g. ``one object a line``.

    Raises:
        BadInput: it is not JSON, or lies deeper or has longer numbers than Python reads.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON ({error.msg} at column {error.colno}); {wanted}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: unreadable JSON ({first_line(error)}); {wanted}") from None


def numbered_lines(path: Path, wanted: str) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not empty, each with its number from 1.

    Raises:
        DataUnavailable, BadInput: as :func:`text_of`.
    """
    lines = text_of(path, wanted).split("\n")  # and not at whatever else ends a line, which JSON may hold
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def objects(path: Path, wanted: str = "one JSON object a line is read") -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file that has one a line, each with its line's number.

    Raises:
        DataUnavailable, BadInput: as :func:`text_of`; or a line is not a JSON object.
    """
    for number, line in numbered_lines(path, wanted):
        found = parsed(line, f"{path}:{number}", wanted)
        if not isinstance(found, dict):
            raise BadInput(f"{path}:{number}: not a JSON object; {wanted}")
        yield number, found
