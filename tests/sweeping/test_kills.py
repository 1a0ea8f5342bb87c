"""Sweeps that are killed, one of a launcher: ``python tests/kills.py`` kills many, and SLURM's too."""

from __future__ import annotations

import pytest

from kills import main

pytestmark = pytest.mark.minutes


@pytest.mark.slow
def test_nothing_is_lost_done_twice_or_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--kills", "2", "--launchers", "basic,local", "--loaded"])
    said = capsys.readouterr().out
    assert "kills 2, lost 0, done twice 0, orphans 0, wrong statuses and hangs 0" in said
    assert status == 0
