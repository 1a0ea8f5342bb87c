"""Launchers and the status of sweeps: a run that dies ends no other, and what happened is shown."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.types import HydraContext, RunMode
from omegaconf import OmegaConf
from rich.console import Console

from helpers import commands
from helpers.places import CONF, EXHAUSTIVE, PARTS, ROOT
from helpers.stores import made_run
from knowledge_compression.errors import BadInput
from knowledge_compression.results.store import RunStore
from knowledge_compression.sweeping import status
from knowledge_compression.sweeping.cli import one_line
from knowledge_compression.sweeping.launching import Job
from knowledge_compression.sweeping.local import LocalLauncher
from knowledge_compression.sweeping.plan import Outcome, PlannedRun, labels, write_plan
from knowledge_compression.sweeping.slurm import HandedIn, SlurmLauncher
from sweep_chores import chore


def launched(tmp_path: Path, whats: list[str], retries: int = 0, **options: Any) -> list[Outcome]:
    """How the chores ended; chore ``i`` has the folder ``<i>``."""
    overrides = [f"hydra.sweep.dir={tmp_path}", f"hydra.run.dir={tmp_path}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", overrides, RunMode.MULTIRUN)
        config.run.retries = retries
        launcher = LocalLauncher(**options)
        launcher.poll_seconds = 0.05
        launcher.setup(hydra_context=HydraContext(loader, Callbacks()), task_function=chore, config=config)
        returns = launcher.launch([[f"+what={what}", f"+number={i}"] for i, what in enumerate(whats)], 0)
    return [returned.return_value for returned in returns]


@pytest.mark.slow
def test_a_killed_job_is_marked_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = launched(tmp_path, ["work", "kill", "exit", "work", "work"], at_once=3)
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "failed", "done", "done"]
    assert outcomes[1].message == "killed by signal 9"
    assert outcomes[2].message == "ended without a result (status 3)"
    assert "so much to say" in Path(outcomes[1].log).read_text()
    assert Outcome.read(tmp_path / "1") == outcomes[1]  # for those who ask later
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(outcomes[i].line in said for i in (1, 2))


@pytest.mark.slow
def test_no_more_than_so_many_at_once(tmp_path: Path) -> None:
    launched(tmp_path, ["work"] * 5, at_once=2)
    spans = [tuple(map(float, (tmp_path / str(i) / "span").read_text().split())) for i in range(5)]
    for start, _ in spans:
        assert sum(begin <= start < end for begin, end in spans) <= 2


@pytest.mark.slow
def test_a_job_that_takes_too_much_memory_is_ended(tmp_path: Path) -> None:
    outcomes = launched(tmp_path, ["hoard", "work"], at_once=2, memory_gb=0.5)
    assert outcomes[0].message == "out of memory: it used more than 0.5 GB"
    assert outcomes[1].status == "done"


@pytest.mark.slow
def test_a_killed_job_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = launched(tmp_path, ["kill_once", "kill"], retries=1, at_once=2)
    assert [outcome.status for outcome in outcomes] == ["done", "failed"]
    assert capsys.readouterr().err.count("retrying") == 2


def test_launchers_refuse_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="at_once=0"):
        LocalLauncher(at_once=0)
    local = LocalLauncher()
    local.config = OmegaConf.create({"run": {"detach": True}})
    with pytest.raises(BadInput, match="hydra/launcher=slurm"):
        local.check()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match="sbatch"):
        SlurmLauncher().check()


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (LocalLauncher, {"at_once": "two"}),
        (LocalLauncher, {"memory_gb": 0}),
        (SlurmLauncher, {"minutes": "8h"}),
        (SlurmLauncher, {"at_once": 0}),
        (SlurmLauncher, {"gpus": -1}),
        (SlurmLauncher, {"memory_gb": "64GB"}),
    ],
)
def test_numbers_of_a_launcher_that_are_none_are_one_line_that_names_them(kind: Any, setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(BadInput, match=f"hydra.launcher.{name}={value} does not fit") as raised:
        kind(**setting)
    wrapped = InstantiationException("Error in call to target")
    wrapped.__cause__ = raised.value  # as Hydra, which builds launchers, passes it on
    assert one_line(wrapped) == str(raised.value)


def test_several_partitions_are_accepted_and_one_that_is_not_there_is_named(
    alive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = "case $* in *-a*) echo 'debug* night hidden';; *) echo 'debug* night';; esac"
    (alive.parent / "bin" / "sinfo").write_text(f"#!/bin/sh\n{listed}\n")
    (alive.parent / "bin" / "sinfo").chmod(0o755)
    for partition in ("debug", "night,debug", "hidden", None):
        launcher = SlurmLauncher(partition=partition)
        launcher.config = OmegaConf.create({"run": {"processes": 1}})
        launcher.check()
    launcher = SlurmLauncher(partition="night,nowhere")
    launcher.config = OmegaConf.create({"run": {"processes": 1}})
    with pytest.raises(BadInput, match=r"partition=nowhere does not exist; choose one of debug, hidden, night"):
        launcher.check()


@pytest.fixture
def alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the jobs that a SLURM of three lines has; whatever it is handed becomes job 9."""
    alive = tmp_path / "alive"
    does = {"squeue": f"cat {alive}", "sacct": "echo OUT_OF_MEMORY", "sbatch": "echo Submitted batch job 9", "srun": ""}
    for name, line in does.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/bin/sh\n{line}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return alive


def test_a_run_of_several_processes_gets_a_gpu_for_each(alive: Path) -> None:
    launcher = SlurmLauncher(gpus=2)
    launcher.config = OmegaConf.create({"run": {"processes": 4}})
    with pytest.raises(BadInput, match=r"run.processes=4 needs a GPU per process.* give hydra.launcher.gpus=4"):
        launcher.check()
    for gpus in (0, 4):
        launcher = SlurmLauncher(gpus=gpus)
        launcher.config = OmegaConf.create({"run": {"processes": 4}})
        with pytest.raises(BadInput, match="sinfo"):  # and asks this SLURM of three lines for more than it has
            launcher.check()


def test_a_second_start_waits_for_what_an_earlier_one_handed_in(
    tmp_path: Path, alive: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first, second = (tmp_path / "sweeps" / name for name in ("first", "second"))
    runs = [PlannedRun([f"sparsity=0.{i}", "target=att"], f"run{i}", "dense") for i in range(5)]
    other = PlannedRun([*runs[4].overrides, "output.save_model=true"], "run4", "dense")
    as_before = [PlannedRun([*run.overrides, "run.detach=true"], run.run_id, "dense") for run in runs[:4]]
    for folder, planned in ((first, [*as_before, other]), (second, runs[::-1])):
        folder.mkdir(parents=True)
        write_plan(folder, planned, at_once=2)
    for i in (0, 1, 2, 4):  # of the fourth nothing is noted yet
        HandedIn(f"7_{i}", f"{i}.log", first / str(i)).write(first / str(i))
    alive.write_text("7_0\n7_1\n7_4\n8\n")  # the third is over, the fifth keeps a model besides

    def started(force: bool = False) -> dict[int, HandedIn]:
        launcher = SlurmLauncher()
        settings = {"output": {"dir": str(tmp_path)}, "run": {"force": force}}
        launcher.config = OmegaConf.create(settings | {"hydra": {"sweep": {"dir": str(second)}}})
        jobs = [Job(None, print, None, run.overrides, i, run.overrides[0]) for i, run in enumerate(runs[::-1])]
        for job in jobs:
            job.config = launcher.config
        found = dict(launcher.start(jobs))
        assert {number: HandedIn.of(second / str(number)).job_id for number in found} == {
            number: handed_in.job_id for number, handed_in in found.items()
        }
        return found

    found = started()
    assert [found[i].job_id for i in range(5)] == ["9_0", "9_1", "9_2", "7_1", "7_0"]
    assert [found[i].folder for i in (2, 3, 4)] == [second / "2", first / "1", first / "0"]
    said = " ".join(caplog.messages)
    assert "2 runs are queued or running already, as job array 7: sparsity=0.1, sparsity=0.0" in said
    assert "submitted 3 runs as job array 9" in said

    launcher = SlurmLauncher()
    launcher.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(second)}}})
    alive.write_text("7_0\n")
    Outcome("sparsity=0.1", "done", "run1", "dense").write(first / "1")
    assert list(launcher.ended({3: found[3], 4: found[4]})) == [3]
    assert Outcome.read(second / "3") == Outcome.read(first / "1")

    alive.write_text("7_0\n7_1\n")
    assert {handed_in.array for handed_in in started(force=True).values()} == {"9"}


def test_a_job_that_slurm_lost_is_over_after_a_while(tmp_path: Path, alive: Path) -> None:
    launcher = SlurmLauncher()
    launcher.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    handles = {i: HandedIn(f"7_{i}", "log", tmp_path / str(i)) for i in range(2)}
    alive.write_text("7_0\n7_1\n")
    assert launcher.ended(handles) == {}
    alive.write_text("7_1\n")
    looks = [launcher.ended(handles) for _ in range(4)]
    assert looks == [{}, {}, {}, {0: "ended by SLURM without a result (OUT_OF_MEMORY)"}]
    alive.write_text("")
    (tmp_path / "1").mkdir()
    Outcome("b", "done").write(tmp_path / "1")
    assert 1 in launcher.ended({1: handles[1]})  # it said so itself: nothing to wait for
    alive.unlink()  # SLURM does not answer
    assert launcher.ended({1: handles[1]}) == {}  # nothing is concluded from silence


def test_labels_tell_jobs_apart() -> None:
    jobs = [["model=bert_tiny", "target=att", "sparsity=0.2"], ["model=bert_tiny", "target=ff", "sparsity=0.2"]]
    assert labels(jobs) == ["target=att", "target=ff"]
    assert labels(jobs[:1]) == ["model=bert_tiny target=att sparsity=0.2"]
    assert labels([["a=1"], ["a=1"]]) == ["a=1", "a=1"]
    assert labels([["run.plan=true", "recovery=lora", "output.dir=x"]]) == ["recovery=lora"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, "unknown"), (45.0, "45 s"), (500.0, "8 min"), (3_900.0, "1:05 h"), (4.3e5, "119:26 h")]
)
def test_the_time_left_is_whole_in_a_terminal_of_80_columns(seconds: float | None, said: str) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    status.show([status.SweepStatus("2026-11-22_09-00-00.123456", ["missing"], [], seconds)], console)
    (row,) = (line for line in console.export_text().splitlines() if line.startswith("2026"))
    assert row.rstrip().endswith(f" {said}")


def test_the_status_of_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no SLURM to ask
    folder = tmp_path / "sweeps" / "2026-11-22_09-00-00.123456"
    folder.mkdir(parents=True)
    runs = [PlannedRun([f"sparsity=0.{i}"], f"run{i}", "dense") for i in range(6)]
    write_plan(folder, runs, at_once=2)
    for run_id in ("run0", "run1", "dense"):
        RunStore(tmp_path).write(made_run([True], id=run_id))
    for number, seconds in ((0, 10.0), (1, 20.0)):
        (folder / str(number)).mkdir()
        Outcome("", "done", f"run{number}", "dense", seconds=seconds).write(folder / str(number))
    (folder / "2").mkdir()
    Outcome("model=m sparsity=0.2", "failed", message="RuntimeError: bad luck", log="2/run.log").write(folder / "2")
    store = RunStore(tmp_path)
    with store.claim("run3"):
        marker = store.layout.lease("run3").read_text()
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        store.layout.lease("run4").write_text(marker.replace(f"pid={os.getpid()}", f"pid={dead.pid}"))
        (found,) = status.sweeps(tmp_path)
    assert found.states == ["done", "done", "failed", "running", "missing", "missing"]
    assert found.seconds_left == pytest.approx(15.0 * 2.5 / 2)
    console = Console(width=120, record=True, file=io.StringIO())
    status.show([found], console)
    text = console.export_text()
    assert "19 s" in text and "failed: sparsity=0.2: RuntimeError: bad luck (log: 2/run.log)" in text
    narrow = Console(width=80, record=True, file=io.StringIO())
    status.show([found], narrow)
    table = narrow.export_text()
    assert all(whole in table for whole in (f"{folder.name} │", " running ", " missing ", " 19 s"))
    assert status.main([str(tmp_path)]) == 1
    finished = tmp_path / "sweeps" / "2026-11-22_10-00-00.123456"  # nothing was left to do when it was started
    finished.mkdir()
    write_plan(finished, runs[:2], at_once=2)
    read, look_up = list[str](), RunStore.look_up
    monkeypatch.setattr(RunStore, "look_up", lambda self, run_id: (read.append(run_id), look_up(self, run_id))[1])
    assert status.sweeps(tmp_path)[-1].seconds_left == 0
    assert len(read) == len(set(read)) == 7  # however many sweeps and baselines a run has
    (tmp_path / "without").mkdir()
    assert status.main([str(tmp_path / "without")]) == 0 and "no sweep was started" in capsys.readouterr().out
    assert status.main([str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not EXHAUSTIVE, reason="test_kills.py kills a local sweep of real runs (KC_TEST_EXHAUSTIVE=1)")
def test_a_local_sweep_of_real_runs_of_which_one_is_killed(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "mishaps").mkdir()
    (tmp_path / "mishaps" / "compression-0.3").write_text("kill")
    command = [str(ROOT / "run.py"), "-m", "hydra/launcher=local", f"hydra.searchpath=[file://{PARTS}/conf]"]
    command += ["model=local", f"model.path={tiny_folder}", "target=all", "compression=stumbling", "eval=[probe]"]
    command += [f"output.dir={tmp_path / 'outputs'}", "sparsity=0.2,0.3"]
    environment = os.environ | {"MISHAPS": str(tmp_path / "mishaps"), "PYTHONPATH": str(PARTS)}
    environment["KC_CACHE_DIR"] = str(tmp_path / "cache")

    first = commands.run(*command, folder=ROOT, environment=environment)
    assert first.returncode == 1, first.stderr
    assert "failed: sparsity=0.3: killed by signal 9" in first.stderr
    second = commands.run(*command, folder=ROOT, environment=environment)
    assert second.returncode == 0, second.stderr
    way = (tmp_path / "mishaps" / "log").read_text().split()
    assert way.count("compression-0.2") == 1 and way.count("compression-0.3") == 2
    assert way.count("probe") == 3  # two runs and one dense baseline
    assert [found.states for found in status.sweeps(tmp_path / "outputs")] == [["done", "done"]] * 2
    assert not (tmp_path / "outputs" / "unfinished").exists()
