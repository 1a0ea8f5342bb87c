"""Kill a run wherever it is and start it again: the same result as undisturbed, nothing twice, nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.experiments import SUITE, made
from knowledge_compression.results.store import RunStore
from knowledge_compression.results.tracker import NoTracker
from sweep_parts import do_run

pytestmark = pytest.mark.slow  # every test starts processes

# What an undisturbed run comes by, in order.
WAY = [
    "load",
    "compression-0.5",
    "after-compression-0.5",
    "probe",
    "after-probe",
    "second",
    "after-second",
    "third",
    "after-third",
    "before-write",
    "half-written",
    "write",
]


@pytest.fixture
def attempt(tmp_path: Path, tiny_folder: Path, processes: Any) -> Any:
    """``attempt(place="kill")`` tries the run once with those mishaps; gives the process's exit code.

    ``attempt({"trains": True})`` is another run: see ``do_run``.
    """
    (tmp_path / "mishaps").mkdir()

    def attempt(what: dict[str, Any] | None = None, **mishaps: str) -> int:
        process = start(what, **mishaps)
        process.join(120)
        return process.exitcode

    def start(what: dict[str, Any] | None = None, **mishaps: str) -> Any:
        for place, mishap in mishaps.items():
            (tmp_path / "mishaps" / place).write_text(mishap)
        arguments = (str(tmp_path / "outputs"), str(tiny_folder), str(tmp_path / "mishaps"))
        process = processes.Process(target=do_run, args=arguments, kwargs=what or {})
        process.start()
        return process

    attempt.start = start  # type: ignore[attr-defined]
    return attempt


def way(tmp_path: Path) -> list[str]:
    return (tmp_path / "mishaps" / "log").read_text().split()


def result(outputs: Path) -> dict[str, Any]:
    (run,) = RunStore(outputs)
    assert sorted(path.name for path in outputs.iterdir()) == ["runs"]
    assert [path.name for path in (outputs / "runs").iterdir()] == [run.id]
    return {"id": run.id, "metrics": run.metrics, "items": run.items.to_dicts(), "eval": run.report["eval"]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, processes: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "mishaps").mkdir()
    arguments = (str(folder / "outputs"), str(tiny_folder), str(folder / "mishaps"))
    process = processes.Process(target=do_run, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert list(dict.fromkeys(way(folder))) == WAY
    return result(folder / "outputs")


def test_a_run_killed_everywhere_goes_on_to_the_same_result(
    attempt: Any, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """One run, started again and again, which comes one place further each time."""
    for place in WAY:
        assert attempt(**{place: "kill"}) == -9, place
        assert not list((tmp_path / "outputs" / "runs").glob("[!.]*")), place
    assert attempt() == 0
    assert result(tmp_path / "outputs") == undisturbed
    for done in ("compression-0.5", "probe", "second", "third"):  # killed twice at it, and not made again afterwards
        assert way(tmp_path).count(done) == 3, done


def test_processes_given_the_same_run_at_once_do_it_once(
    attempt: Any, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    several = [attempt.start() for _ in range(5)]
    for process in several:
        process.join(120)
    assert [process.exitcode for process in several] == [0] * 5
    assert way(tmp_path).count("compression-0.5") == 1
    assert result(tmp_path / "outputs") == undisturbed


def test_one_that_waits_takes_over_from_one_that_is_killed(
    attempt: Any, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    first = attempt.start(second="sleep 600")
    while not (tmp_path / "mishaps" / "log").is_file() or "second" not in way(tmp_path):
        first.join(0.05)
    waiting = attempt.start()
    first.join(0.5)
    assert waiting.is_alive()
    first.kill()
    waiting.join(120)
    assert waiting.exitcode == 0
    assert way(tmp_path).count("probe") == 1 and way(tmp_path).count("second") == 2
    assert result(tmp_path / "outputs") == undisturbed


def test_a_run_that_raises_keeps_what_it_had(attempt: Any, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    assert attempt(second="no such luck") == 1
    assert attempt() == 0
    assert way(tmp_path).count("probe") == 1
    assert result(tmp_path / "outputs") == undisturbed


def test_half_a_saved_model_of_an_interrupted_attempt_is_not_in_the_run(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    experiment = made(tiny_folder, {"a": SUITE})
    for save_model in (False, True):
        store = RunStore(tmp_path / f"outputs-{save_model}")
        half = store.workplace(experiment.id) / "model"
        half.mkdir(parents=True)
        (half / "model.gguf").write_bytes(b"GGUF")
        run = replace(experiment, save_model=save_model).run(store, NoTracker())
        assert run.folder is not None
        left = {path.name for path in run.folder.glob("model/*")}
        assert "model.gguf" not in left and ("model.safetensors" in left) == save_model
        assert (run.folder / "model").exists() == save_model


def test_a_training_that_is_killed_goes_on_from_the_step_it_reached(
    attempt: Any, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, tiny_folder: Path, processes: Any
) -> None:
    from knowledge_compression.results.store import RunStore

    quiet = tmp_path_factory.mktemp("quiet")
    (quiet / "mishaps").mkdir()
    arguments = (str(quiet / "outputs"), str(tiny_folder), str(quiet / "mishaps"))
    process = processes.Process(target=do_run, args=arguments, kwargs={"trains": True})
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert attempt({"trains": True}, training="kill") == -9
    assert not (tmp_path / "outputs" / "runs").exists()
    assert attempt({"trains": True}) == 0
    assert way(tmp_path).count("compression-0.5") == 1  # the compressed model was whole before the training began
    assert result(tmp_path / "outputs") == result(quiet / "outputs")
    (here,), (there,) = RunStore(tmp_path / "outputs"), RunStore(quiet / "outputs")
    assert here.report["recovery"]["details"]["resumed_at"] in ([20], [30])
    assert there.report["recovery"]["details"]["resumed_at"] == []
    assert here.report["recovery"]["loss_after"] == there.report["recovery"]["loss_after"]


def test_runs_that_differ_in_what_follows_compress_once(attempt: Any, tmp_path: Path) -> None:
    """Also in processes that start together; and what was found gives what compressing gives."""
    from knowledge_compression.results.store import RunStore

    different = [{"suites": ["probe"]}, {"suites": ["pair"]}, {"suites": ["pair", "probe"]}, {"trains": True}]
    several = [attempt.start(what) for what in different]
    for process in several:
        process.join(120)
    assert [process.exitcode for process in several] == [0] * 4
    assert way(tmp_path).count("compression-0.5") == 1
    runs = list(RunStore(tmp_path / "outputs"))
    assert sorted(run.report["compression"].pop("found") for run in runs) == [False, True, True, True]
    assert all(run.report["compression"] == runs[0].report["compression"] for run in runs)
    plain = [run for run in runs if run.config["choices"]["recovery"] == "none"]
    assert len({value for run in plain for name, value in run.metrics.items() if name.endswith("log_prob")}) == 1
