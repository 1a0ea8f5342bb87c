"""Stopping a process: cleanly at the first signal, at once at the second, and together with its parent.

Only the standard library is imported here, so a command can be stopped from its first moment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

GRACE = 40.0  # seconds in which a process that was told to stop must end by itself; a tracker may take 30 of them
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(KeyboardInterrupt):
    """The process was told to stop; raised in the main thread wherever it is."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number

    @property
    def status(self) -> int:
        """The exit status that shells give a process which ended by that signal: 130 for Ctrl-C."""
        return 128 + self.signal_number


@contextmanager
def stoppable(grace: float = GRACE) -> Iterator[None]:
    """A context in which Ctrl-C, SIGTERM and SIGHUP end the process cleanly, whatever they interrupt.

    :class:`Stopped` is raised in the main thread. Python drops an exception that is raised in a finalizer or in a
    callback of C code; it is then raised again. Code that swallows it has ``grace`` seconds, after which the process
    ends anyway. A second Ctrl-C ends it at once, which is safe anywhere: a run's files are complete at every moment.

    Raises:
        SystemExit: the process was stopped; status 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    if threading.current_thread() is not threading.main_thread():  # signals can only be handled there
        yield
        return
    stopper = _Stopper(grace)
    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, stopper) for number in heeded}
    report, sys.unraisablehook = sys.unraisablehook, stopper.dropped
    try:
        yield
    except Stopped as stopped:
        raise SystemExit(stopped.status) from None
    finally:
        stopper.ended.set()
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stopper:
    """Handles the signals and makes sure that the process ends."""

    def __init__(self, grace: float) -> None:
        self.grace, self.report = grace, sys.unraisablehook
        self.ended = threading.Event()
        self.asked: int | None = None  # the signal that told this process to stop
        self.again = False  # whether we repeat it ourselves

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.again and self.asked is not None:
            self.again = False
            raise Stopped(self.asked)
        if self.asked is None:
            self.asked = number
            _say("stopping; finished work is kept (press Ctrl-C again to end at once)\n")
            threading.Thread(target=self._insist, daemon=True).start()
            raise Stopped(number)
        if number == signal.SIGINT:
            os._exit(128 + number)

    def dropped(self, unraisable: Any) -> None:
        """Called by Python for an exception that it cannot raise where it happened."""
        if isinstance(unraisable.exc_value, Stopped):
            threading.Timer(0.05, self._repeat).start()
        else:
            self.report(unraisable)

    def _repeat(self) -> None:
        self.again = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _insist(self) -> None:
        if not self.ended.wait(self.grace) and self.asked is not None:
            _say(f"stopped after {self.grace:g} s in which it did not end by itself\n")
            os._exit(128 + self.asked)


def end_with_parent() -> None:
    """End this process when its parent ends, even by ``kill -9``; only possible on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end_when_closed(pipe: int) -> None:
    """End this process when the other end of a pipe is closed, e.g. because the process that holds it has ended.

    A thread does this, so it works on any system, but it may have to wait for C code that holds the interpreter lock.
    """

    def wait() -> None:
        while os.read(pipe, 1):
            pass
        os._exit(128 + signal.SIGHUP)

    threading.Thread(target=wait, daemon=True).start()


def _say(line: str) -> None:
    """Write to the terminal from a signal handler, in which the buffers of ``sys.stderr`` may be in use."""
    with suppress(OSError):
        os.write(2, line.encode())
