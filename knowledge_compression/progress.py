"""Progress on the terminal: on the error stream, gone when it is over, and nothing where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

T = TypeVar("T")


def bars(*columns: ProgressColumn) -> Progress:
    """A display of bars, as a context; rich's own columns where none are given."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def shown(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, one after the other, with a bar that says how far they are."""
    with bars() as display:
        yield from display.track(items, description=what)
