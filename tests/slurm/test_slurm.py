"""A sweep on a real SLURM: one run raises, one is killed for memory, one is requeued; nothing is lost or done twice.

Run by ``make test-slurm``, which starts a whole SLURM on this machine (``single_node.sh``) beside any that is there.
Nothing here is timed: what is waited for may take as long as a busy machine needs, up to ``PATIENCE``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knowledge_compression.results.store import RunStore
from knowledge_compression.sweeping.status import sweeps

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PARTS = ROOT / "tests" / "parts"
NEEDED = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db")

PATIENCE = 1200.0  # seconds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * PATIENCE)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A SLURM of one node; gives the environment in which its commands find it."""
    if "KC_TEST_SLURM" not in os.environ:
        pytest.skip("starts daemons; run it with make test-slurm")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root")
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        subprocess.run([HERE / "single_node.sh", "start", folder], check=True, timeout=PATIENCE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "etc" / "slurm.conf"))
            patch.setenv("KC_CACHE_DIR", str(folder / "cache"))
            yield dict(os.environ)
    finally:
        subprocess.run([HERE / "single_node.sh", "stop", folder], check=False, timeout=60)


@pytest.fixture
def sweep(slurm: dict[str, str], tmp_path: Path, tiny_folder: Path) -> Any:
    """``sweep("sparsity=0.1,0.2", ...)`` starts a sweep on SLURM and gives its process."""
    (tmp_path / "mishaps").mkdir()

    def start(*overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "run.py", "-m", "hydra/launcher=slurm", f"hydra.searchpath=[file://{PARTS}/conf]"]
        command += ["model=local", f"model.path={tiny_folder}", "target=all", "compression=stumbling"]
        command += ["eval=[probe,second]", f"output.dir={tmp_path / 'outputs'}", "tracker=none"]
        command += ["hydra.launcher.gpus=0", "hydra.launcher.cpus=1", "hydra.launcher.memory_gb=2", *overrides]
        environment = slurm | {"MISHAPS": str(tmp_path / "mishaps"), "PYTHONPATH": str(PARTS), "OMP_NUM_THREADS": "1"}
        environment["KC_CACHE_DIR"] = str(tmp_path / "cache")  # no test finds what another one compressed
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    return start


def way(folder: Path) -> list[str]:
    log = folder / "mishaps" / "log"
    return log.read_text().split() if log.is_file() else []


def wait_until(true: Any, process: subprocess.Popen[str] | None = None) -> None:
    """Wait for something that a process that is still there will do."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.5)


def test_a_sweep_of_four_with_three_mishaps(sweep: Any, slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mishaps" / "compression-0.2").write_text("always bad luck")
    (tmp_path / "mishaps" / "compression-0.3").write_text("memory")
    (tmp_path / "mishaps" / "after-compression-0.1").write_text("sleep 600")
    process = sweep("sparsity=0.1,0.2,0.3,0.4", "run.retries=1", "hydra.launcher.at_once=2")
    wait_until(lambda: "after-compression-0.1" in way(tmp_path), process)
    (note,) = (tmp_path / "outputs" / "sweeps").glob("*/0/slurm_job")
    subprocess.run(["scontrol", "requeue", note.read_text().split()[0]], check=True, env=slurm)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, output
    runs = list(RunStore(tmp_path / "outputs"))
    reached = sorted(run.config["sparsity"] for run in runs if run.config["choices"]["compression"] != "none")
    assert reached == [0.1, 0.3, 0.4], output
    assert len(runs) == 4  # and the dense baseline, once
    failures = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert failures and all("sparsity=0.2" in line and "always bad luck" in line for line in failures), output
    assert re.search(r"sparsity=0\.3: ended by SLURM without a result \(\w+\); retrying", output)
    came_by = way(tmp_path)
    started = {f"compression-0.{i}": came_by.count(f"compression-0.{i}") for i in range(1, 5)}
    # what raised was tried again, what was killed or requeued began again, all else was done once
    assert started == {f"compression-0.{i}": 2 if i in (1, 2, 3) else 1 for i in range(1, 5)}
    assert came_by.count("probe") == came_by.count("second") == 4
    (status,) = sweeps(tmp_path / "outputs")
    assert (status.count("done"), status.count("failed"), status.count("missing")) == (3, 1, 0)
    again = sweep("sparsity=0.1,0.3,0.4")  # the same command again has nothing to do
    output, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, output
    assert way(tmp_path) == came_by


def test_a_detached_sweep_goes_on_by_itself(sweep: Any, tmp_path: Path) -> None:
    process = sweep("sparsity=0.1", "run.detach=true")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    (status,) = sweeps(tmp_path / "outputs")
    assert len(status.states) == 1
    wait_until(lambda: not {"missing", "running"} & set(sweeps(tmp_path / "outputs")[0].states))
    (status,) = sweeps(tmp_path / "outputs")
    assert status.states == ["done"], status.outcomes


def test_a_second_start_waits_for_what_the_first_handed_in(sweep: Any, slurm: dict[str, str], tmp_path: Path) -> None:
    process = sweep("sparsity=0.1,0.2", "run.detach=true", "hydra.launcher.options={hold:true}")
    output, _ = process.communicate(timeout=PATIENCE)
    (array,) = re.findall(r"submitted 2 runs as job array (\d+)", output)
    again = sweep("sparsity=0.1,0.2,0.3")
    notes = lambda: list((tmp_path / "outputs" / "sweeps").glob("*/*/slurm_job"))  # noqa: E731
    wait_until(lambda: len(notes()) == 5, again)
    assert [note.read_text().startswith(array) for note in notes()].count(True) == 4
    subprocess.run(["scontrol", "release", array], check=True, env=slurm)
    output, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, output
    assert re.search(rf"2 runs are queued or running already, as job array {array}: sparsity=0.1, sparsity=0.2", output)
    assert "submitted 1 runs" in output and "3 runs done, 0 failed" in output
    assert [way(tmp_path).count(f"compression-0.{i}") for i in (1, 2, 3)] == [1, 1, 1]
    assert [found.states for found in sweeps(tmp_path / "outputs")] == [["done"] * 2, ["done"] * 3]


def test_walltime_is_continued(sweep: Any, slurm: dict[str, str], tmp_path: Path) -> None:
    """The limit is brought near once the run has its first suite, so that a slow start is not taken for a slow run."""

    def scontrol(*update: str) -> None:
        subprocess.run(["scontrol", "update", f"JobId={job_id}", *update], check=True, env=slurm)

    def is_running() -> bool:
        command = ["squeue", "-h", "-j", job_id, "-o", "%T"]
        return "RUNNING" in subprocess.run(command, check=True, env=slurm, text=True, capture_output=True).stdout

    (tmp_path / "mishaps" / "second").write_text(f"sleep {2 * PATIENCE}")
    process = sweep("sparsity=0.1", "hydra.launcher.minutes=10", "hydra.launcher.requeues=1")
    wait_until(lambda: "second" in way(tmp_path))
    (note,) = (tmp_path / "outputs" / "sweeps").glob("*/0/slurm_job")
    job_id = note.read_text().split()[0]
    scontrol("EndTime=now+95seconds")  # the signal comes 90 s before
    wait_until(lambda: not is_running())
    scontrol("TimeLimit=30")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert way(tmp_path).count("probe") == 2  # the run and its baseline; the first suite was not asked again
    assert way(tmp_path).count("second") == 3


def test_fifty_that_start_at_the_same_second_compress_and_ask_the_dense_model_once(sweep: Any, tmp_path: Path) -> None:
    if os.environ["KC_TEST_SLURM"] != "all":
        pytest.skip("takes minutes and memory for fifty processes; run it with KC_TEST_SLURM=all make test-slurm")
    recoveries = [f"recovery-{by}" for by in range(50)]
    process = sweep("sparsity=0.5", "recovery=nudge", "recovery.by=range(50)")
    output, _ = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0, output
    (array,) = re.findall(r"submitted 50 runs as job array (\d+)", output)
    command = ["sacct", "-n", "-X", "-P", "-j", array, "-o", "Start,End"]
    spans = [line.split("|") for line in subprocess.check_output(command, text=True).split()]
    assert len(spans) == 50 and max(start for start, _ in spans) < min(end for _, end in spans)  # all side by side
    came_by = way(tmp_path)
    assert came_by.count("compression-0.5") == 1
    assert sorted(place for place in came_by if place in recoveries) == sorted(recoveries)
    assert came_by.count("probe") == came_by.count("second") == 51  # each run, and their one dense baseline
    assert len(list(RunStore(tmp_path / "outputs"))) == 51


def test_a_partition_that_does_not_exist_is_one_line(sweep: Any, tmp_path: Path) -> None:
    process = sweep("sparsity=0.1,0.2", "hydra.launcher.partition=nowhere")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert [line for line in output.splitlines() if line.startswith("error:")] == [
        "error: hydra.launcher.partition=nowhere does not exist; choose one of debug"
    ]
    assert not (tmp_path / "outputs").exists()


def test_gpus_that_the_nodes_do_not_have_are_one_line_that_says_what_to_give(sweep: Any, tmp_path: Path) -> None:
    process = sweep("sparsity=0.1,0.2", "hydra.launcher.gpus=1")
    output, _ = process.communicate(timeout=PATIENCE)
    (line,) = (line for line in output.splitlines() if "error" in line)
    assert process.returncode == 2 and line.startswith("error: SLURM refused the jobs: ")
    assert line.endswith("hydra.launcher.gpus=0 runs on their processors")
    assert sweeps(tmp_path / "outputs") == []  # nothing is missing of what was never taken
