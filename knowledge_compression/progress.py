"""Progress bars on the error stream: removed when finished, and absent without a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

T = TypeVar("T")


def bars(*columns: ProgressColumn) -> Progress:
    """A display of bars, as a context; with rich's default columns if none are given."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def shown(items: Iterable[T], what: str) -> Iterator[T]:
    """Yield the items while a bar shows the progress."""
    with bars() as display:
        yield from display.track(items, description=what)
