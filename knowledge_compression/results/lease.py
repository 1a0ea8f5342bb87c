"""The lease on a run: one process makes the run, on any host, and others can see which."""

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
    """The process that has a lease, and so is making a run.

    Attributes:
        pid, host: which process, and where.
    """

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def holder(file: Path, lease: float = LEASE) -> Holder | None:
    """The living process that has the lease, or None.

    A process of this host is looked for; one of another host counts as alive if it renewed the lease within ``lease``
    seconds of this host's clock, which is good enough to be shown: nobody takes a run over because of it.
    """
    found = SoftFileLease(file, lease_duration=lease).owner
    if found is None:
        return None
    host, _, namespace = found.hostname.partition("?pidns-")  # filelock names a container's own processes that way
    if host == socket.gethostname() and namespace == _namespace():
        return Holder(found.pid, host) if _is_alive(found.pid) else None
    with suppress(FileNotFoundError):
        if time.time() - file.stat().st_mtime < lease:
            return Holder(found.pid, host)
    return None


def _is_alive(pid: int) -> bool:
    import psutil

    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def _namespace() -> str:
    """The namespace of process ids, as filelock writes it; empty for the host's own."""
    with suppress(OSError):
        inode = Path("/proc/self/ns/pid").stat().st_ino
        return "" if inode == 0xEFFFFFFC else f"{inode:x}"  # PROC_PID_INIT_INO of linux/proc_ns.h
    return ""


@contextmanager
def leased(file: Path, lease: float = LEASE) -> Iterator[None]:
    """Be the one process that has the lease, on whichever host; others are waited for.

    Its owner touches the file every ``lease / 3`` seconds. It is stale when its owner is dead on this host, or when the
    file was not touched for ``lease`` seconds of the waiting process's own clock: clocks of different hosts are never
    compared. A process that slept longer than that goes on; both then write the same result, and the store keeps one.

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
            patience = -1.0  # for ever: a dead owner's lease ends
        except FileNotFoundError:  # the last one to leave took the empty folder with it
            continue
    try:
        yield
    finally:
        held.release()


def _warn(loss: LeaseCompromise) -> None:
    log.warning("another process took over run %s (%s)", Path(loss.lock_file).stem, loss.reason)
