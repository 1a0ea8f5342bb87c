"""Recognizing secrets, which are never written: by name, by form, or because the environment contains them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

HIDDEN = "***"

_WORDS = r"(?:token|secret|password|passwd|credentials?|apikey|[_-]key)"
_NAME = re.compile(rf"{_WORDS}$", re.IGNORECASE)
_ASSIGNED = re.compile(rf"({_WORDS}\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;\"'\]}}]+)", re.IGNORECASE)
# Tokens of Hugging Face, GitHub, OpenAI, AWS and Slack; a password inside an address.
_SHAPE = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|AKIA[A-Z0-9]{16}|xox[abprs]-[\w-]{10,}"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
# A W&B key, unless it is a git commit, as in paths and names of files from the hub.
_HEX = re.compile(r"(?<![0-9a-fA-F/@])[0-9a-f]{40}(?![0-9a-fA-F])")
_COMMIT = re.compile(r"(revision|commit|content)$")


def is_secret(name: str, value: object) -> bool:
    """Whether a setting looks like a secret."""
    text = str(value)
    return bool(_NAME.search(name) or text in _of_the_environment() or _without_shapes(name, text) != text)


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line with ``***`` in place of anything that looks like a secret."""
    return list(_hidden(arguments))


def hidden(settings: Any) -> Any:
    """Plain data with ``***`` in place of anything that looks like a secret, at any depth."""
    held = _of_the_environment()

    @cache
    def without(name: str, text: str) -> str:
        if _NAME.search(name) or text in held:
            return HIDDEN
        return _ASSIGNED.sub(rf"\1{HIDDEN}", _without_shapes(name, text))

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(part, str(key)) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [walk(part, name) for part in value]
        if isinstance(value, str):
            return without(name, value)
        return HIDDEN if isinstance(value, int | float) and _NAME.search(name) else value

    return walk(settings, "")


def _without_shapes(name: str, text: str) -> str:
    text = _SHAPE.sub(HIDDEN, text)
    return text if _COMMIT.search(name) else _HEX.sub(HIDDEN, text)


def _hidden(arguments: Sequence[str]) -> Iterator[str]:
    held, follows = _of_the_environment(), False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if follows:
            yield HIDDEN
        elif equals and (_NAME.search(name) or value in held):
            yield f"{name}={HIDDEN}"
        else:
            yield HIDDEN if argument in held else _without_shapes(name, argument)
        follows = argument.startswith("--") and not equals and bool(_NAME.search(name))


def _of_the_environment() -> set[str]:
    return {value for name, value in os.environ.items() if value and _NAME.search(name)}
