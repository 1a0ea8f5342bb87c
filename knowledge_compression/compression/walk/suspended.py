"""Forward passes that stop before chosen modules and wait to be told how to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn


class SuspendedForward:
    """One forward pass of the network that stops at every marked module and waits to be told how to go on.

    A greenlet rather than a thread, so that torch's thread-local modes and thread pools are the caller's.

    Args:
        run: the forward pass.
        around: gives the context in which the pass runs, and in which whoever waits for it does not: torch's modes
            belong to the thread, so one that the pass opened by itself would stay open while it is suspended.

    Attributes:
        unit: path of the module before which it stands; None at the end.
        args, kwargs: what that module was called with.
    """

    def __init__(self, run: Callable[[], None], around: Callable[[], AbstractContextManager[Any]]) -> None:
        self._around = around
        self.unit: str | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self._greenlet = greenlet(run)

    def resume(self, *answer: Callable[[Callable[..., Any]], Any]) -> None:
        """Run on to the next marked module.

        Args:
            answer: gives the waiting module's output, from its own ``forward`` if it likes; none at the start.
        """
        with self._around():
            self.unit, self.args, self.kwargs = self._greenlet.switch(*answer) or (None, (), {})

    def give(self, output: Any) -> None:
        """Give the waiting module's output and run on to the next marked module."""
        self.resume(lambda _forward: output)

    def cancel(self) -> None:
        """Leave the forward pass where it stands."""
        if self._greenlet:
            self._greenlet.throw(GreenletExit)


@contextmanager
def marked(network: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Make the modules at ``paths`` suspend the forward passes that run in greenlets of their own."""
    main = getcurrent()
    with ExitStack() as undo:
        for path in paths:
            module = network.get_submodule(path)
            undo.callback(_restore, module, module.__dict__.get("forward"))
            module.forward = _suspending(path, module.forward, main)
        yield


def _suspending(path: str, forward: Callable[..., Any], main: greenlet) -> Callable[..., Any]:
    def suspended(*args: Any, **kwargs: Any) -> Any:
        if getcurrent() is main:
            return forward(*args, **kwargs)
        return main.switch((path, args, kwargs))(forward)

    return suspended


def _restore(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward
