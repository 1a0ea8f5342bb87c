"""Sweeps that are killed, a few of them: ``python tests/kills.py`` kills many, SLURM's too."""

from __future__ import annotations

import pytest

from kills import main


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_nothing_is_lost_done_twice_or_left_behind(launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--kills", "2", "--launchers", launcher])
    said = capsys.readouterr().out
    assert "kills 2, lost 0, done twice 0, orphans 0, wrong statuses and hangs 0" in said
    assert status == 0
