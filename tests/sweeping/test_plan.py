"""The plan of a sweep, by which others count what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from knowledge_compression.sweeping.plan import PlannedRun, withdraw_plan, write_plan
from knowledge_compression.sweeping.status import sweeps


@pytest.mark.parametrize("started", [False, True])
def test_a_sweep_that_was_refused_whole_counts_as_none(tmp_path: Path, started: bool) -> None:
    """As when SLURM refuses the jobs; a job that was taken before goes on, and is counted."""
    folder = tmp_path / "sweeps" / "refused"
    folder.mkdir(parents=True)
    write_plan(folder, [PlannedRun([f"sparsity=0.{i}"], f"run{i}", "dense") for i in (1, 2)], at_once=2)
    if started:
        (folder / "1").mkdir()
    withdraw_plan(folder)
    assert [sweep.states for sweep in sweeps(tmp_path)] == ([["missing", "missing"]] if started else [])
