"""The lease on a run: only one process, on any host, makes a run, and others can see which."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

log = logging.getLogger(__name__)

LEASE = 60.0  # seconds without a sign of life after which another process may take a run over


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease and so is making a run.

    Attributes:
        pid, host: its process id and host.
    """

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def holder(file: Path, lease: float = LEASE) -> Holder | None:
    """The living process that holds the lease, or None.

    On this host the process itself is checked; one that started long after the last sign of life was only given the
    number of the dead owner, as happens after a restart. A process on another host counts as alive if it renewed the
    lease within ``lease`` seconds by this host's clock, which is good enough for display: no run is taken over because
    of it.
    """
    found = SoftFileLease(file, lease_duration=lease).owner
    if found is None:
        return None
    host, _, namespace = found.hostname.partition("?pidns-")  # filelock's notation for a container's own processes
    here = host == socket.gethostname() and namespace == _namespace()
    with suppress(FileNotFoundError):
        until = file.stat().st_mtime + lease
        if _was_alive(found.pid, until) if here else time.time() < until:
            return Holder(found.pid, host)
    return None


def _was_alive(pid: int, then: float) -> bool:
    """Whether a process of this host is alive, and already was at that time."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() < then)
    return False


def _namespace() -> str:
    """The namespace of process ids in filelock's notation; empty for the host's own."""
    with suppress(OSError):
        inode = Path("/proc/self/ns/pid").stat().st_ino
        return "" if inode == 0xEFFFFFFC else f"{inode:x}"  # PROC_PID_INIT_INO of linux/proc_ns.h
    return ""


@contextmanager
def leased(file: Path, lease: float = LEASE) -> Iterator[None]:
    """Hold the lease, as the only process on any host; wait if another process holds it.

    Its owner touches the file every ``lease / 3`` seconds. It is stale if its owner is dead on this host, or if the
    file was not touched for ``lease`` seconds by the waiting process's own clock: clocks of different hosts are never
    compared. An owner that was suspended for longer continues afterwards; both then write the same result, and the
    store keeps one.

    Raises:
        OSError: the file cannot be written.
    """
    held = SoftFileLease(file, lease_duration=lease, on_compromise=_warn, poll_interval=0.5)
    patience = 0.0
    while not held.is_locked:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=patience)
        except Timeout:
            log.info("%s is making run %s; this process waits for it", holder(file, lease) or "another", file.stem)
            patience = -1.0  # no time limit: a dead owner's lease expires
        except FileNotFoundError:  # the previous owner removed the empty folder
            continue
    try:
        yield
    finally:
        held.release()


def _warn(loss: LeaseCompromise) -> None:
    log.warning("another process took over run %s (%s)", Path(loss.lock_file).stem, loss.reason)
