"""Progress on the error stream: removed when finished, and absent without a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

T = TypeVar("T")


def bars(*columns: ProgressColumn) -> Progress:
    """A display of bars, as a context; with rich's default columns if none are given."""
    from rich.progress import Progress

    return Progress(
        *columns,
        console=_terminal(),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # results that go elsewhere stay there
        disable=not sys.stderr.isatty(),
    )


def shown(items: Iterable[T], what: str) -> Iterator[T]:
    """Yield the items while a bar shows the progress."""
    with counted(len(items) if isinstance(items, Sized) else None, what) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def counted(total: int | None, what: str) -> Iterator[Callable[[int], None]]:
    """Show a bar in this context; call the function with the number of things done since the last call."""
    if not sys.stderr.isatty():  # then rich need not be imported
        yield lambda done: None
        return
    with bars() as display:
        task = display.add_task(what, total=total)
        yield lambda done: display.advance(task, done)


@contextmanager
def underway(what: str) -> Iterator[None]:
    """Show, in this context, what is being done and for how long."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    with bars(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as display:
        display.add_task(what, total=None)
        yield


@cache
def _terminal() -> Console:
    """One console for all, so that a display inside another is drawn below it."""
    from rich.console import Console

    return Console(stderr=True)
