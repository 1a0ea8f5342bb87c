"""Idle threads sleep soon, unless the user's environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from knowledge_compression.threads import let_idle_threads_sleep

STARTED = """
import os, sys
sys.argv = ["run.py", "--help"]
from knowledge_compression.sweeping.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, os.environ.get("GOMP_SPINCOUNT"), file=sys.stderr)
"""


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_the_users_own_choice_is_left_alone(monkeypatch: pytest.MonkeyPatch, own: dict[str, str]) -> None:
    environment = dict(own)
    monkeypatch.setattr(os, "environ", environment)
    let_idle_threads_sleep()
    assert environment == (own or {"GOMP_SPINCOUNT": "1000"})


def started(program: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)
    return ended.stderr


def test_a_run_chooses_before_torch_is_loaded() -> None:
    assert started(STARTED).splitlines()[-1] == "False 1000"


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has another OpenMP there")
def test_torch_obeys() -> None:
    program = "from knowledge_compression.threads import let_idle_threads_sleep as f; f(); import torch"
    assert "GOMP_SPINCOUNT = '1000'" in started(program, OMP_DISPLAY_ENV="verbose")
