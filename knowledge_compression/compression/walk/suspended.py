"""Forward passes that are suspended before chosen modules and resumed by the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from greenlet import GreenletExit, getcurrent, greenlet

if TYPE_CHECKING:
    from torch import nn


class SuspendedForward:
    """One forward pass of the network that is suspended before every marked module until the caller resumes it.

    A greenlet rather than a thread, so that torch's thread-local modes and thread pools are the caller's.

    Args:
        run: the forward pass.
        around: returns the context in which the pass runs but its caller does not: torch's modes belong to the thread,
            so a mode that the pass opened itself would stay active while the pass is suspended.

    Attributes:
        unit: path of the module before which the pass is suspended; None once it has finished.
        args, kwargs: the arguments of the call to that module.
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
            answer: returns the output to use for the suspended module; it may call that module's own ``forward``. None
                at the start.
        """
        with self._around():
            self.unit, self.args, self.kwargs = self._greenlet.switch(*answer) or (None, (), {})

    def give(self, output: Any) -> None:
        """Return the suspended module's output and run on to the next marked module."""
        self.resume(lambda _forward: output)

    def cancel(self) -> None:
        """Abandon the forward pass."""
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
