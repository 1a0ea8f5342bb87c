"""Several processes that read the batches of one evaluation: ``run.processes``.

The process that asks forms the batches, as it would alone, and reads some of them itself; helpers, one process each,
read the others. Every batch is read whole by one of them, so its answers do not depend on how many there are. A helper
that dies loses nothing: its batch is read by another.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from typing import IO, Any, NamedTuple

import torch

from knowledge_compression.errors import first_line
from knowledge_compression.evaluation.scoring.handing import handed_over, packed, unpacked
from knowledge_compression.evaluation.scoring.reader import Reader, Request
from knowledge_compression.models.device import Device

log = logging.getLogger(__name__)

_AHEAD = 4  # batches for each process whose results may wait for an earlier one's

Batch = list[int]


class _Died(Exception):
    """A helper has ended."""


class _Failed(NamedTuple):
    """An error of a helper, to be raised where the answers are wanted."""

    error: BaseException


class Helpers:
    """Helpers for the scorers of one model; a context that ends them.

    Args:
        processes: how many read, this one included.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._team: list[_Helper] = []
        self._of: tuple[Any, ...] = ()
        self._weights: IO[bytes] | None = None

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, *_: object) -> None:
        for helper in self._team:
            helper.end()
        self._team.clear()
        if self._weights is not None:
            self._weights.close()

    @property
    def pids(self) -> list[int]:
        """The process ids of the helpers that are there."""
        return [helper.process.pid for helper in self._team]

    def start(self, reader: Reader) -> None:
        """Start the helpers now and wait until they can read; otherwise they join in once they can."""
        for helper in list(self._team_for(reader)):
            helper.get_ready()

    def read(self, reader: Reader, work: Iterator[tuple[Batch, Request]]) -> Iterator[tuple[Batch, int, int, Any]]:
        """Read requests, with the helpers' help, and give the results in the order of the requests.

        Args:
            reader: reads here; the first one is handed to the helpers, which read for no other model.
            work: batches, and the request for each.

        Yields:
            A batch, and what :meth:`Reader.read` yields of its request.

        Raises:
            Exception: the first error that any of them met.
        """
        team = self._team_for(reader)
        if not team:
            yield from reader.read_all(work)
            return
        shared = _Shared(work, _AHEAD * self.processes)
        for helper in team:
            threading.Thread(target=self._feed, args=(helper, shared, reader), daemon=True).start()
        with _threads(torch.get_num_threads() // self.processes, reader.model.device):
            try:
                while (step := shared.next()) is not None:
                    if isinstance(step, _Job):
                        shared.put(step, list(reader.read(step.request)))
                        continue
                    batch, parts = step
                    for part in parts:
                        yield (batch, *part)
            finally:
                shared.stop()

    def _team_for(self, reader: Reader) -> list[_Helper]:
        of = (reader.model.network, reader.prompts, reader.dtype)
        if not self._of:
            self._of = of
            self._start(reader)
        return self._team if all(a is b for a, b in zip(of, self._of, strict=True)) else []

    def _start(self, reader: Reader) -> None:
        own = reader.model.device
        try:
            data, self._weights = handed_over((reader.light(), Device.known))
        except Exception as error:  # whatever a network or a part of a user's cannot be pickled for
            told = f"this model cannot be handed to other processes ({first_line(error)}): one process asks"
            log.warning(told)
            reader.budget.fallbacks.append(told)
            return
        threads = max(1, torch.get_num_threads() // self.processes)
        for number in range(1, self.processes):
            place = own if own.type == "cpu" else torch.device(own.type, (own.index or 0) + number)
            self._team.append(_Helper(data, self._weights, place, threads))

    def _feed(self, helper: _Helper, shared: _Shared, reader: Reader) -> None:
        """Give a helper one request after the other; in a thread of its own."""
        job: _Job | None = None
        try:
            helper.get_ready()
            while (job := shared.take()) is not None:
                named = {"tokenizer": reader.model.tokenizer}
                parts, halvings, read, padded = helper.ask(packed(job.request, named))
                with shared.changed:
                    reader.tokens_read += read
                    reader.tokens_padded += padded
                    for _ in range(halvings):
                        reader.budget.halve()
                shared.put(job, parts)
        except _Died as died:
            with suppress(ValueError):
                self._team.remove(helper)
                if not shared.stopped:
                    told = f"a process that asks {died}; {len(self._team) + 1} go on, and ask its questions again"
                    reader.budget.fallbacks.append(told)
                    log.warning(told)
            if job is not None:
                shared.give_back(job)
        except BaseException as error:
            shared.fail(error)


class _Job(NamedTuple):
    place: int
    batch: Batch
    request: Request


class _Shared:
    """The work of one call: who takes what, and the results in order."""

    def __init__(self, work: Iterator[tuple[Batch, Request]], ahead: int) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.stopped = False
        self._work, self._ahead = work, ahead
        self._back: deque[_Job] = deque()  # taken by one that died
        self._batches: dict[int, Batch] = {}
        self._done: dict[int, Any] = {}
        self._given = self._next = 0
        self._is_out = False
        self._failed: BaseException | None = None

    def take(self) -> _Job | None:
        """A job for a helper, once there is one; None when there will be none."""
        with self.changed:
            while not (self.stopped or self._failed):
                if (job := self._job()) is not None:
                    return job
                if self._is_out and self._next == self._given:
                    break
                self.changed.wait()
        return None

    def next(self) -> _Job | tuple[Batch, Any] | None:
        """For the process that asks: the next result if it is there, else a job, else whichever comes first."""
        with self.changed:
            while True:
                if self._failed is not None:
                    raise self._failed
                if self._next in self._done:
                    place, self._next = self._next, self._next + 1
                    self.changed.notify_all()
                    return self._batches.pop(place), self._done.pop(place)
                if (job := self._job()) is not None:
                    return job
                if self._is_out and self._next == self._given:
                    return None
                self.changed.wait()

    def put(self, job: _Job, parts: Any) -> None:
        """Take the results of a job."""
        with self.changed:
            self._done[job.place] = parts
            self.changed.notify_all()

    def give_back(self, job: _Job) -> None:
        """Take a job back that was not done."""
        with self.changed:
            self._back.append(job)
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Let the process that asks raise an error."""
        with self.changed:
            self._failed = self._failed or error
            self.changed.notify_all()

    def stop(self) -> None:
        """Give no more jobs."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def _job(self) -> _Job | None:
        if self._back:
            return self._back.popleft()
        if self._is_out or self._given >= self._next + self._ahead:
            return None
        try:
            batch, request = next(self._work)
        except StopIteration:
            self._is_out = True
            self.changed.notify_all()
            return None
        self._batches[self._given] = batch
        self._given += 1
        return _Job(self._given - 1, batch, request)


class _Helper:
    """A process that reads for this one."""

    def __init__(self, data: bytes, weights: IO[bytes], place: torch.device, threads: int) -> None:
        self._ours, theirs = Pipe()
        self._using = threading.Lock()
        self._data: bytes | None = data
        inherited = (theirs.fileno(), weights.fileno())
        where = [*map(str, inherited), str(place), str(threads)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "knowledge_compression.evaluation.scoring.helping", *where],
            stdin=subprocess.PIPE,  # never written to: it closes when this process ends, for whatever reason
            stdout=subprocess.DEVNULL,
            pass_fds=inherited,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(threads)},
            process_group=0,  # a terminal's Ctrl-C reaches only this process, which then ends it
        )
        theirs.close()

    def get_ready(self) -> None:
        """Hand the reader over, once.

        Raises:
            _Died: it ended, or could not take the reader.
        """
        with self._using:
            if self._data is None:
                return
            data, self._data = self._data, None
            try:
                self._exchange(data)
            except _Died:
                raise
            except Exception as error:
                self.end()
                raise _Died(f"could not take the model over ({first_line(error)})") from None

    def ask(self, request: bytes) -> Any:
        """The answer to a request.

        Raises:
            _Died: it ended.
            Exception: the error that it met.
        """
        with self._using:
            return self._exchange(request)

    def _exchange(self, sent: bytes) -> Any:
        try:
            self._ours.send_bytes(sent)
            answer = unpacked(self._ours.recv_bytes())
        except (EOFError, OSError):
            raise _Died(self._how_it_ended()) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _how_it_ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(5)
            return f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended ({code})"
        return "does not answer"

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._ours.close()


@contextmanager
def _threads(count: int, place: torch.device) -> Iterator[None]:
    """Compute on the CPU with so many threads in this context; helpers have the others."""
    before = torch.get_num_threads()
    if place.type == "cpu":
        torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)
