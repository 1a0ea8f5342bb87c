"""What looks like a secret and is written nowhere: by its name, by its shape, or because the environment holds it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

HIDDEN = "***"

_NAME = re.compile(r"(token|secret|password|passwd|credentials?|apikey|[_-]key)$", re.IGNORECASE)
# Tokens of Hugging Face, GitHub, OpenAI, AWS, Slack and W&B; a password inside an address.
_SHAPE = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|AKIA[A-Z0-9]{16}|xox[abprs]-[\w-]{10,}"
    r"|(?<![0-9a-fA-F])[0-9a-f]{40}(?![0-9a-fA-F])|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)


def is_secret(name: str, value: object) -> bool:
    """Whether a setting looks like one."""
    text = str(value)
    return bool(_NAME.search(name) or _SHAPE.search(text) or text in _of_the_environment())


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line in which what looks like a secret is ``***``."""
    return list(_hidden(arguments))


def _hidden(arguments: Sequence[str]) -> Iterator[str]:
    held, follows = _of_the_environment(), False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if follows:
            yield HIDDEN
        elif equals and (_NAME.search(name) or value in held):
            yield f"{name}={HIDDEN}"
        else:
            yield HIDDEN if argument in held else _SHAPE.sub(HIDDEN, argument)
        follows = argument.startswith("--") and not equals and bool(_NAME.search(name))


def _of_the_environment() -> set[str]:
    return {value for name, value in os.environ.items() if value and _NAME.search(name)}
