"""Wrong inputs end in one line or in a true answer: some of ``make trials``, which tries them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.places import EXHAUSTIVE
from trials.__main__ import BAD, summary
from trials.inputs import KINDS
from trials.materials import prepare
from trials.trying import ACCEPTED, HANG, ONE_LINE, STACK_TRACE, WRONG, Ending, Tester, Trial

pytestmark = pytest.mark.minutes

# One in so many of each kind.
ONE_IN = {"controls": 1, "issue": 40, "settings": 500, "configurations": 34, "files": 81, "folders": 8, "stores": 106}
if EXHAUSTIVE:
    ONE_IN = {
        "controls": 1,
        "issue": 16,
        "settings": 200,
        "configurations": 10,
        "files": 30,
        "folders": 4,
        "stores": 50,
    }


@pytest.mark.slow
def test_some_of_every_kind_end_well(tmp_path: Path) -> None:
    trials = [trial for kind, step in ONE_IN.items() for trial in list(KINDS[kind]())[::step]]
    prepare(tmp_path / "good")
    endings = list(Tester(tmp_path / "good", tmp_path).all(trials, at_once=2))
    bad = [f"{one.how}: {one.trial.name}: {one.said[-400:]}" for one in endings if one.how in BAD]
    assert not bad, "\n".join(bad)
    assert sum(one.how == ONE_LINE for one in endings) > 20
    assert {one.how for one in endings if one.trial.must == "accept"} == {ACCEPTED}


def test_there_are_enough_of_them_and_no_two_are_alike() -> None:
    trials = [trial for make in KINDS.values() for trial in make()]
    assert len(trials) > 1000
    names = [trial.name for trial in trials]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("status", "errors", "runs", "must", "how"),
    [
        (2, "error: bad\n", 0, "refuse", ONE_LINE),
        (2, "error: bad\nerror: worse\n", 0, "refuse", STACK_TRACE),
        (2, "", 0, "refuse", STACK_TRACE),
        (2, "error: bad\n", 1, "refuse", WRONG),
        (1, "error: bad\n", 0, "refuse", STACK_TRACE),
        (-11, "", 0, "either", STACK_TRACE),
        (0, "Traceback (most recent call last):\n", 0, "either", STACK_TRACE),
        (0, "", 1, "refuse", WRONG),
        (0, "", 1, "either", ACCEPTED),
        (2, "error: bad\n", 0, "accept", WRONG),
    ],
)
def test_the_judge_lets_nothing_pass(status: int, errors: str, runs: int, must: str, how: str, tmp_path: Path) -> None:
    (tmp_path / "stderr").write_text(errors)
    for i in range(runs):
        run = tmp_path / "out" / "runs" / f"run{i}"
        run.mkdir(parents=True)
        for name in ("metrics.json", "report.json"):
            (run / name).write_text("{}")
    assert Tester(tmp_path, tmp_path)._judged(Trial("one", (), must=must), tmp_path, status).how == how


def test_the_judge_sees_a_nan_and_the_run_of_what_it_was_before(tmp_path: Path) -> None:
    tester, run = Tester(tmp_path, tmp_path), tmp_path / "out" / "runs" / "run"
    run.mkdir(parents=True)
    (tmp_path / "stderr").touch()
    for name in ("metrics.json", "report.json"):
        (run / name).write_text('{"accuracy": 0.5}')

    def how(must: str, *, spoilt: bool = False) -> str:
        return tester._judged(Trial("one", ("a",), print if spoilt else None, must), tmp_path, 0).how

    assert how("accept") == ACCEPTED
    assert how("either", spoilt=True) == WRONG
    (run / "metrics.json").write_text('{"accuracy": NaN}')
    assert how("either") == WRONG


def test_the_figures_count_every_ending() -> None:
    trial, sound = Trial("one", ()), Trial("two", (), must="accept")
    endings = [Ending(trial, ONE_LINE), Ending(trial, HANG), Ending(trial, STACK_TRACE), Ending(sound, ACCEPTED)]
    assert summary(endings) == (
        "tried 3: one line 1, accepted 0, stack trace 1, accepted wrongly 0, hang 1; "
        "with nothing wrong 1, of them accepted 1"
    )
