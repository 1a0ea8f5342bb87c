"""Who makes a run at this moment: told of processes of this host and of others, dead and alive."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from knowledge_compression.results.lease import Holder, holder, leased


@pytest.fixture
def marker(tmp_path: Path) -> str:
    """What a lease of this process holds."""
    with leased(tmp_path / "mine.lock"):
        return (tmp_path / "mine.lock").read_text()


def test_a_process_that_has_it_is_named(tmp_path: Path) -> None:
    file = tmp_path / "unfinished" / "a1.lock"
    assert holder(file) is None
    with leased(file):
        assert holder(file) == Holder(os.getpid(), socket.gethostname())
        assert str(holder(file)) == f"process {os.getpid()} on {socket.gethostname()}"
    assert holder(file) is None


def test_a_dead_process_of_this_host_has_nothing_however_fresh_the_file(tmp_path: Path, marker: str) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    file = tmp_path / "a1.lock"
    file.write_text(marker.replace(f"pid={os.getpid()}", f"pid={dead.pid}"))
    while True:  # before it is waited for, it is a zombie
        if holder(file) is None:
            break
        time.sleep(0.05)
    dead.wait()
    assert holder(file) is None


def test_a_process_that_was_given_the_number_of_a_dead_one_has_nothing(tmp_path: Path, marker: str) -> None:
    file = tmp_path / "a1.lock"
    file.write_text(marker)
    assert holder(file) is not None
    died = time.time() - 365 * 24 * 3600  # before this process started
    os.utime(file, (died, died))
    assert holder(file) is None


def test_a_process_of_another_host_is_believed_for_the_time_of_a_lease(tmp_path: Path, marker: str) -> None:
    file = tmp_path / "a1.lock"
    file.write_text(marker.replace(f"host={socket.gethostname()}", "host=elsewhere"))
    assert holder(file) == Holder(os.getpid(), "elsewhere")
    old = time.time() - 3600
    os.utime(file, (old, old))
    assert holder(file) is None


@pytest.mark.parametrize("content", ["", "nonsense\n"])
def test_what_is_no_lease_has_no_holder(tmp_path: Path, content: str) -> None:
    (tmp_path / "a1.lock").write_text(content)
    assert holder(tmp_path / "a1.lock") is None
