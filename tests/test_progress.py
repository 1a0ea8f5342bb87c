"""Progress is for people at a terminal: nobody else gets a byte of it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from helpers.places import PACKAGE
from knowledge_compression.progress import bars, shown

SHOWING = "from knowledge_compression.progress import shown; print(list(shown(range(3), 'counting')))"


def test_nothing_is_shown_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(shown(range(3), "counting")) == [0, 1, 2]
    with bars() as display:
        display.advance(display.add_task("training", total=2))
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_it_on_the_error_stream() -> None:
    ours, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    ended = subprocess.run([sys.executable, "-c", SHOWING], stdout=subprocess.PIPE, stderr=terminal, env=environment)
    os.close(terminal)
    assert ended.stdout == b"[0, 1, 2]\n"
    assert b"counting" in os.read(ours, 10_000)
    os.close(ours)


def test_there_is_one_way_to_show_it() -> None:
    """Bars of their own would go to standard output, or into logs; tqdm with ``disable=None`` does neither."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        made = re.search(r"(?<!def )(?<!\.)\b(?:track|Progress)\(", text)
        assert path.name == "progress.py" or made is None, path
        for call in re.findall(r"tqdm\(.*", text):
            assert "disable=None" in call, path
