"""A part of a run as plain data, and its identity: the fields of its dataclass that decide a result.

The metadata of a field says that its value does not count, and why::

    path: str = field(metadata=PLACE)         # where something is; the part's fingerprint() digests its content
    block_size: int = field(default=128, metadata=SPEED)   # affects speed or safety, never results
    note: str = field(default="", metadata=LABEL)          # a name
    blocks: Ints = field(default=None, metadata=ADDED)     # counts only with another value than its default

Every other field counts, whether or not a configuration file lists it.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from knowledge_compression.errors import BadInput

PLACE: Mapping[str, bool] = {"place": True}
SPEED: Mapping[str, bool] = {"speed": True}
LABEL: Mapping[str, bool] = {"label": True}
ADDED: Mapping[str, bool] = {"added": True}  # runs from before the field existed keep their hashes

TARGET = "_target_"  # the key for the class that plain data describes
CONTENT = "content"  # and the key for the digest of the content at its places
SEED = "seed"  # a part with random draws has a field of this name, and no other source of randomness


def plain(part: Any) -> Any:
    """All fields of a part as plain data, from which it can be built again.

    Raises:
        BadInput: the part is neither plain data nor a dataclass.
    """
    return _walked(part, plain, lambda part: {f.name: plain(getattr(part, f.name)) for f in _settings(part)})


def identity(part: Any) -> Any:
    """The fields of a part that decide a result, as plain data: equal parts give equal data, however they were built.

    Raises:
        BadInput: the part is neither plain data nor a dataclass, or the content at a place cannot be read.
    """

    def deciding(part: Any) -> dict[str, Any]:
        told = {f.name: identity(getattr(part, f.name)) for f in _settings(part) if _counts(part, f)}
        content = part.fingerprint() if hasattr(part, "fingerprint") else None
        return told | ({} if content is None else {CONTENT: content})

    return _walked(part, identity, deciding)


def known_identity(part: Any) -> Any:
    """The identity of a part, computed once in its lifetime: the content at its places may be gigabytes."""
    known = _known.get(id(part))
    if known is None or known[0]() is not part:
        forget = partial(_forget, id(part))
        known = _known[id(part)] = weakref.ref(part, forget), identity(part)
    return known[1]


def _forget(key: int, _: weakref.ref[Any]) -> None:
    _known.pop(key, None)


_known: dict[int, tuple[weakref.ref[Any], Any]] = {}


def digest_of(deciding: Any) -> str:
    """Sixteen hexadecimal digits for plain data."""
    text = json.dumps(deciding, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draws(part: Any) -> bool:
    """Whether anything in a part is random."""
    if isinstance(part, Mapping):
        return any(map(draws, part.values()))
    if isinstance(part, list | tuple):
        return any(map(draws, part))
    if not is_dataclass(part):
        return False
    return any(f.name == SEED or draws(getattr(part, f.name)) for f in _settings(part))


def rounded(value: float) -> float:
    """A number in the form in which it would be typed: 0.1 + 0.2 is 0.3."""
    return float(f"{value:.12g}")


def _walked(part: Any, walk: Callable[[Any], Any], of_fields: Callable[[Any], dict[str, Any]]) -> Any:
    if part is None or isinstance(part, bool | int | float | str | Path | Enum):
        return _plain_value(part)
    if is_dataclass(part) and not isinstance(part, type):
        kind = type(part)
        return {TARGET: f"{kind.__module__}.{kind.__qualname__}"} | of_fields(part)
    if isinstance(part, Mapping):
        return {str(key): walk(value) for key, value in part.items()}
    if isinstance(part, Set):
        return sorted(walk(value) for value in part)
    if isinstance(part, Sequence):
        return [walk(value) for value in part]
    kind = type(part)
    raise BadInput(f"{kind.__module__}.{kind.__qualname__} is not a dataclass, so its identity is unknown")


def _plain_value(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return rounded(value) if isinstance(value, float) else str(value) if isinstance(value, Path) else value


def _settings(part: Any) -> Iterator[Field[Any]]:
    """The fields that are set when the part is built."""
    return (f for f in fields(part) if f.init and f.compare)


def _counts(part: Any, f: Field[Any]) -> bool:
    if f.metadata.get("added"):
        return bool(getattr(part, f.name) != f.default)
    return not any(f.metadata.get(mark) for mark in ("place", "speed", "label"))
