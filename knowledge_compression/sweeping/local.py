"""One process per run on this machine; the processes end with the one that started them."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.stopping import GRACE, end_when_closed, end_with_parent, stoppable
from knowledge_compression.sweeping.launching import AtLeast1, Job, Positive, ProcessLauncher, check_numbers


class LocalLauncher(ProcessLauncher):
    """One process per run on this machine, a few at a time.

    Args:
        at_once: number of simultaneous runs.
        memory_gb: a run whose processes together use more memory (resident set) is killed; None for no limit.
    """

    def __init__(self, at_once: int = 2, memory_gb: float | None = None) -> None:
        check_numbers(AtLeast1, {"at_once": at_once})
        check_numbers(Positive | None, {"memory_gb": memory_gb})
        self.at_once, self.memory_gb = at_once, memory_gb
        self._running: dict[int, Any] = {}
        self._why: dict[int, str] = {}

    def check(self) -> None:
        """Refuse detaching: only a cluster continues without the process that started the sweep."""
        if self.config.run.detach:
            raise BadInput("run.detach=true needs hydra/launcher=slurm; here the sweep ends with this process")

    def start(self, jobs: Sequence[Job]) -> Mapping[int, Any]:
        """Start as many as there is room for."""
        cores = max(1, (os.cpu_count() or 1) // self.at_once)
        started = {}
        for job in list(jobs)[: self.at_once - len(self._running)]:
            log_file = job.folder / "output.log"
            job.folder.mkdir(parents=True, exist_ok=True)
            with log_file.open("ab") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "knowledge_compression.sweeping.local"],
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={"OMP_NUM_THREADS": str(cores)} | os.environ,
                    process_group=0,  # a terminal's Ctrl-C reaches only this process, which then ends its jobs
                )
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended already; its outcome is collected like any other
                process.stdin.write(pickle.dumps(job))
                process.stdin.flush()  # left open: it closes when this process ends, for whatever reason
            self._running[job.number] = started[job.number] = (process, log_file)
        return started

    def ended(self, handles: Mapping[int, Any]) -> Mapping[int, str]:
        """The jobs whose process has ended; those that use too much memory are killed here."""
        over = {}
        for number, (process, _) in handles.items():
            if self.memory_gb is not None and _memory(process.pid) > self.memory_gb * 1e9:
                self._why[number] = f"out of memory: it used more than {self.memory_gb} GB"
                _signal(process, signal.SIGKILL)
                process.wait()
            if (code := process.poll()) is not None:
                if code < 0:
                    _signal(process, signal.SIGKILL)  # its children may still be running
                how = f"killed by signal {-code}" if code < 0 else f"ended without a result (status {code})"
                over[number] = self._why.pop(number, how)
                del self._running[number]
        return over

    def log_of(self, handle: Any) -> str:
        """What it printed."""
        return str(handle[1])

    def stop(self) -> None:
        """End running jobs: in order at first; by force if they have not ended after most of the available time."""
        end = time.monotonic() + 0.8 * GRACE
        for process, _ in self._running.values():
            _signal(process, signal.SIGTERM)
        for process, _ in self._running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a job and to all its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _memory(pid: int) -> int:
    """Resident bytes of a process and its children; 0 if it has ended."""
    import psutil

    try:
        process = psutil.Process(pid)
        return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def _do_job() -> None:
    """Do the job that the launcher writes to standard input; end when the launcher ends."""
    with stoppable():
        end_with_parent()
        job = pickle.load(sys.stdin.buffer)
        watch = os.dup(sys.stdin.fileno())
        os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())  # jobs never read standard input
        end_when_closed(watch)
        job()


if __name__ == "__main__":
    _do_job()
