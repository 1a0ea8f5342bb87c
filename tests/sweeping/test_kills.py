"""A sweep that is killed: ``python tests/kills.py`` kills many, of every launcher."""

from __future__ import annotations

import pytest

from helpers.places import EXHAUSTIVE
from kills import main

pytestmark = pytest.mark.minutes


@pytest.mark.slow
def test_nothing_is_lost_done_twice_or_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    kills, launchers = (4, "basic,local") if EXHAUSTIVE else (1, "local")  # test_crash.py kills the basic launcher's
    moment = [] if EXHAUSTIVE else ["--moment", "while it trains"]  # when its jobs run for certain
    status = main(["--kills", str(kills), "--launchers", launchers, *moment, "--loaded"])
    said = capsys.readouterr().out
    assert f"kills {kills}, lost 0, done twice 0, orphans 0, wrong statuses and hangs 0" in said
    assert status == 0
