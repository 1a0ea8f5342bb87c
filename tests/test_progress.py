"""Progress is for people at a terminal: nobody else gets a byte of it."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest
from transformers.utils import logging

from helpers.places import PACKAGE
from knowledge_compression.models.failures import quiet
from knowledge_compression.progress import bars, counted, shown, underway

SHOWING = """
from knowledge_compression.progress import counted, shown, underway
with underway("starting"):
    print(list(shown(range(3), "counting")))
with counted(10, "decoding") as advance:
    advance(10)
"""


def test_nothing_is_shown_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(shown(range(3), "counting")) == [0, 1, 2]
    with bars() as display:
        display.advance(display.add_task("training", total=2))
    with underway("starting"), counted(2, "decoding") as advance:
        advance(2)
    assert capfd.readouterr() == ("", "")


def test_a_terminal_gets_it_on_the_error_stream() -> None:
    ours, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    ended = subprocess.run([sys.executable, "-c", SHOWING], stdout=subprocess.PIPE, stderr=terminal, env=environment)
    os.close(terminal)
    assert ended.stdout == b"[0, 1, 2]\n"
    said = os.read(ours, 100_000)
    assert b"starting" in said and b"counting" in said and b"decoding" in said and b"100%" in said
    os.close(ours)


def test_the_hubs_downloads_are_shown_while_transformers_is_silent() -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    enable_progress_bars()
    with quiet():
        assert not are_progress_bars_disabled() and not logging.is_progress_bar_enabled()
    disable_progress_bars()  # a user's choice
    with quiet():
        assert are_progress_bars_disabled()


def test_there_is_one_way_to_show_it() -> None:
    """Bars of their own would go to standard output, or into logs, or be drawn over ours."""
    for path in PACKAGE.rglob("*.py"):
        made = re.search(r"(?<!def )(?<!\.)\b(?:track|tqdm|Progress)\(", path.read_text(encoding="utf-8"))
        assert path.name == "progress.py" or made is None, path
