"""The W&B dashboard of a sweep, as it would be sent: no server is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.stores import made_run
from knowledge_compression import dashboard
from knowledge_compression.results.store import RunStore
from knowledge_compression.sweeping.plan import PlannedRun, write_plan


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    store = RunStore(tmp_path)
    runs = [made_run([1, 1, 1], compression="none", id="dense")]
    runs += [
        made_run([1, 0, 1], target=target, sparsity=s, id=f"{target}{s}")
        for target in ("att", "ff")
        for s in (0.2, 0.4)
    ]
    for run in runs:
        run.metrics |= {"atlas.r0.accuracy": 0.5, "atlas.r1.accuracy": 0.25}
        store.write(run)
    for name, ids in (("2026-01-01", ["att0.2"]), ("2026-01-02", [run.id for run in runs[1:]])):
        folder = tmp_path / "sweeps" / name
        folder.mkdir(parents=True)
        write_plan(folder, [PlannedRun([], run_id, "dense") for run_id in ids], at_once=1)
    return tmp_path


def test_the_dashboard_compares_what_the_sweep_varied(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what = dashboard.compared(outputs)
    assert what.sweep == "2026-01-02" and what.headlines == ["atlas/accuracy"]
    assert list(what.varied) == ["target", "sparsity", "compression_sparsity"]
    assert dashboard.compared(outputs, "2026-01-01").varied == []
    assert dashboard.main([str(outputs), "--json", "--entity", "us", "--project", "p"]) == 0
    told = json.loads(capsys.readouterr().out)
    spec = json.dumps(told)
    for part in ("atlas/accuracy", "compression/sparsity", "atlas/r0/accuracy", "figures/atlas", "2026-01-02"):
        assert part in spec
    assert spec.count('"2026-01-02"') >= 2  # both show this sweep's runs alone
    assert {"workspace", "report"} == told.keys()
    assert told["report"]["project"]["name"] == "p" and "sweep 2026-01-02" in told["workspace"]["displayName"]


def test_what_cannot_be_shown_is_one_line(outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboard.main([str(outputs), "--sweep", "2025", "--json"]) == 2
    assert "there are: 2026-01-01, 2026-01-02" in capsys.readouterr().err
    assert dashboard.main([str(tmp_path / "nowhere"), "--json"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
