"""The run store: whole folders or none, one process a run, and an interrupted run goes on where it was."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from filelock import SoftFileLease

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.suite import Evaluation, item_table
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.results.workplace import Workplace

ITEMS = item_table([{"suite": "probe", "task": "t", "id": "t/0", "correct": True, "log_prob": 0.1}])

CHOICES = {"model": "m", "target": "att", "compression": "none", "recovery": "none"}
CONFIG = {"seed": 0, "sparsity": 0.2, "reading": "module", "compression": {}, "eval": {"probe": {}}, "choices": CHOICES}


def made(run_id: str = "a1", **metrics: float) -> Run:
    report = {"model": {"name": "m", "family": "decoder"}, "eval": {"probe": {}}}
    return Run(run_id, dict(CONFIG), metrics or {"probe.accuracy": 0.1 + 0.2}, report, {}, None, ITEMS)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "outputs")
    assert list(store) == [] and store.find("a1") is None
    store.write(made())
    run = store.find("a1")
    assert run is not None and run.metrics == {"probe.accuracy": 0.1 + 0.2} and run.config == CONFIG
    assert run.items.equals(ITEMS)
    assert [found.id for found in store] == ["a1"]


def test_layers_lie_beside_the_report(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    layers = [{"path": "a", "removed": 3}, {"path": "b", "removed": 4}]
    run = made()
    run.report["compression"] = {"sparsity": 0.5, "layers": layers}
    assert run.layers == layers
    store.write(run)
    found = store.find("a1")
    assert found is not None and found.layers == layers and found.report["compression"] == {"sparsity": 0.5}
    assert run.report["compression"]["layers"] == layers  # the one in memory is as it was
    store.write(made("b2"))
    assert "b2" in store and "c3" not in store
    assert store.find("b2").layers == []  # type: ignore[union-attr]


def test_settings_are_read_section_by_section(tmp_path: Path) -> None:
    """As the whole file would be: lists at the top, text over lines, sections that share a value."""
    store, shared = RunStore(tmp_path), ["x", {"y": 1}]
    config = {"list": [1, 2], "text": "a\n  b: c\n- d\n" * 30, "deep": {"a": shared, "empty": None}, "other": shared}
    config |= {"#odd": 1, "-odd": {"k": True}, "é": "ü", "none": {}} | CONFIG
    for run_id in ("a1", "b2"):
        run = made(run_id)
        run.config = config
        store.write(run)
    run = made("c3")
    run.config = {"deep": {"a": 1}, "-odd": [3], "list": [[1], {"b": []}]} | CONFIG
    store.write(run)
    assert [found.config for found in store] == [config, config, run.config]


def test_a_forced_run_replaces_the_one_that_was_there(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write(made(x=1.0))
    store.write(made(x=2.0))
    assert [run.metrics for run in store] == [{"x": 2.0}]
    assert [path.name for path in store.runs_folder.iterdir()] == ["a1"]


def _replace(folder: str, step: int) -> None:
    """Put another run in the place of ``a1``; killed before it makes, moves or removes the file of that number."""
    steps = itertools.count()

    def kill(event: str, _: Any) -> None:
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    RunStore(folder).write(made(x=2.0))


@pytest.mark.slow
def test_whenever_a_forced_run_is_killed_the_one_before_it_or_its_own_is_there(tmp_path: Path, processes: Any) -> None:
    store, seen = RunStore(tmp_path / "outputs"), []
    for step in itertools.count():
        store.write(made(x=1.0))
        replacing = processes.Process(target=_replace, args=(str(store.folder), step))
        replacing.start()
        replacing.join(60)
        found = store.find("a1")
        assert found is not None and found.items.equals(ITEMS), step
        assert [(run.id, run.metrics) for run in store] == [("a1", found.metrics)], step
        seen.append(found.metrics["x"])
        with store.claim("a1"):  # as the next start of the run does
            again = store.find("a1")
            assert again is not None and again.metrics == found.metrics, step
            assert [path.name for path in store.runs_folder.iterdir()] == ["a1"], step
        if replacing.exitcode == 0:
            break
        assert replacing.exitcode == -signal.SIGKILL
    assert seen == sorted(seen) and len(seen) > 8 and seen.count(2.0) > 2


def test_a_replacement_that_cannot_take_its_place_leaves_the_run_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path)
    store.write(made(x=1.0))
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if Path(to).name == "a1":
            raise OSError(28, "No space left on device")
        return rename(path, to)

    with monkeypatch.context() as broken, pytest.raises(BadInput, match="cannot be written"):
        broken.setattr(Path, "rename", refuse)
        store.write(made(x=2.0))
    assert [run.metrics for run in store] == [{"x": 1.0}]
    store.write(made(x=3.0))
    assert [run.metrics for run in store] == [{"x": 3.0}]
    assert [path.name for path in store.runs_folder.iterdir()] == ["a1"]


def test_folders_of_several_machines_are_merged_by_copying(tmp_path: Path) -> None:
    here, there = RunStore(tmp_path / "here"), RunStore(tmp_path / "there")
    here.write(made("a1"))
    there.write(made("b2"))
    (there.runs_folder / "b2").rename(here.runs_folder / "b2")
    assert [run.id for run in here] == ["a1", "b2"]


def test_a_claim_clears_what_a_dead_attempt_left_and_leaves_nothing_itself(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "outputs")
    half = store.runs_folder / ".a1-dead"
    half.mkdir(parents=True)
    (half / "config.yaml").write_text("seed: 0")
    other = store.runs_folder / ".b2-alive"
    other.mkdir()
    with store.claim("a1"):
        assert not half.exists() and other.exists()
    assert sorted(path.name for path in store.folder.iterdir()) == ["runs"]
    with pytest.raises(BadInput, match="no such fact"), RunStore(tmp_path / "fresh").claim("a1"):
        raise BadInput("no such fact")
    assert not (tmp_path / "fresh").exists()


def test_a_finished_suite_is_not_asked_again(tmp_path: Path) -> None:
    place = Workplace(tmp_path / "a1")
    found = Evaluation({"accuracy": 1 / 3}, ITEMS, {"protocol": "paper"})
    first = place.evaluation("probe", lambda: found)
    again = place.evaluation("probe", lambda: pytest.fail("asked again"))
    assert again.metrics == first.metrics and again.items.equals(ITEMS) and again.description == found.description


def test_a_suite_that_raises_keeps_nothing(tmp_path: Path) -> None:
    place = Workplace(tmp_path / "a1")
    with pytest.raises(ZeroDivisionError):
        place.evaluation("probe", lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert place.evaluation("probe", lambda: Evaluation({}, ITEMS)).items.equals(ITEMS)


def test_what_a_run_keeps_for_others_moves_into_its_folder_and_the_rest_goes(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with store.claim("a1") as place:
        place.evaluation("probe", lambda: Evaluation({}, ITEMS))
        (place.folder / "model").mkdir()
        (place.folder / "model" / "config.json").write_text("{}")
        run = store.write(made())
    assert run.folder is not None
    assert {path.name for path in run.folder.iterdir()} >= {"model", "metrics.json"}
    assert not any(path.name.startswith(".") for path in run.folder.iterdir())
    assert not (tmp_path / "unfinished").exists()


@pytest.fixture
def another_disk() -> Iterator[Path]:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


def test_finished_runs_may_lie_on_another_disk(tmp_path: Path, another_disk: Path) -> None:
    (tmp_path / "runs").symlink_to(another_disk)
    store = RunStore(tmp_path)
    with store.claim("a1") as workplace:
        workplace.add("layer_map.png", b"PNG")
        (workplace.folder / "model").mkdir()
        workplace.add("model/config.json", b"{}")
        store.write(made())
    assert (another_disk / "a1" / "layer_map.png").read_bytes() == b"PNG"
    assert (another_disk / "a1" / "model" / "config.json").read_bytes() == b"{}"
    assert [run.id for run in store] == ["a1"] and not (tmp_path / "unfinished").exists()


def test_what_others_may_read_of_a_run_they_may_read_whole(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with store.claim("a1") as place:
        place.add("model.safetensors", b"weights")
        (place.folder / "model.safetensors").chmod(0o600)  # as safetensors leaves it
        run = store.write(made())
    assert run.folder is not None
    modes = {path.name: path.stat().st_mode for path in run.folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.yaml"] != 0o100600


def test_outputs_that_cannot_be_written_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(BadInput, match=r"output\.dir=.*cannot be written"), RunStore(tmp_path / "outputs").claim("a1"):
        pass

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    store = RunStore(tmp_path / "full")
    with pytest.raises(BadInput, match="No space left"), store.claim("a1"):
        store.write(made())
    assert not list(store.folder.rglob("*.json"))


def _hold(folder: str, ready: Any, seconds: float) -> None:
    with RunStore(folder, lease=2.0).claim("a1"):
        ready.set()
        time.sleep(seconds)


@pytest.mark.slow
def test_the_claim_of_a_dead_process_is_taken_over_and_a_living_one_waited_for(tmp_path: Path, processes: Any) -> None:
    ready = processes.Event()
    holder = processes.Process(target=_hold, args=(str(tmp_path), ready, 1.0))
    holder.start()
    assert ready.wait(60)
    start = time.monotonic()
    with RunStore(tmp_path, lease=2.0).claim("a1"):
        assert time.monotonic() - start > 0.5  # it was waited for
    holder.join()
    ready.clear()
    killed = processes.Process(target=_hold, args=(str(tmp_path), ready, 600.0))
    killed.start()
    assert ready.wait(60)
    killed.kill()
    killed.join()
    with RunStore(tmp_path, lease=2.0).claim("a1"):
        pass


@pytest.mark.slow
def test_a_dead_owner_on_another_host_is_taken_over_when_its_lease_ends(tmp_path: Path) -> None:
    store = RunStore(tmp_path, lease=2.0)
    lock = tmp_path / "unfinished" / "a1.lock"
    lock.parent.mkdir()
    lease = SoftFileLease(lock, lease_duration=2.0)
    lease.acquire()
    marker = lock.read_text()
    lease.release()
    assert socket.gethostname() in marker
    lock.write_text(marker.replace(socket.gethostname(), "a-node-that-burnt-down"))
    start = time.monotonic()
    with store.claim("a1"):
        assert 1.5 < time.monotonic() - start < 10


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "report.json", "environment.json", "items.parquet"])
def test_half_copied_folders_are_named_skipped_and_counted(tmp_path: Path, name: str) -> None:
    store = RunStore(tmp_path)
    for run_id in ("a1", "b2", "c3"):
        store.write(made(run_id))
    (store.runs_folder / "a1" / name).unlink()
    cut = store.runs_folder / "b2" / name
    cut.write_bytes(cut.read_bytes()[: 3 if name == "config.yaml" else -4])
    runs, skipped = store.scan()
    assert [run.id for run in runs] == [run.id for run in store] == ["c3"]
    assert [run_id for run_id, _ in skipped] == ["a1", "b2"]
    assert skipped[0][1] == f"half-copied: {name} is not there"
    assert skipped[1][1].startswith(f"damaged: {name} cannot be read")
    assert store.find("a1") is None  # it is done again


def test_a_run_that_only_another_user_may_read_is_named_and_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(tmp_path)
    for run_id in ("a1", "b2"):
        store.write(made(run_id))
    is_file = Path.is_file

    def denied(path: Path) -> bool:
        if path.parent.name == "b2":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", denied)
    runs, skipped = store.scan()
    assert [run.id for run in runs] == ["a1"]
    assert skipped == [("b2", "it cannot be read (Permission denied)")]
    assert "b2" not in store


def test_a_folder_of_another_version_is_named_and_skipped(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for run_id in ("a1", "b2"):
        store.write(made(run_id))
    (store.runs_folder / "a1" / "environment.json").write_text('{"format": 99}')
    (store.runs_folder / "notes.txt").write_text("a file of the user's own")
    runs, skipped = store.scan()
    assert [run.id for run in runs] == ["b2"]
    assert skipped == [("a1", "of another version: its format is 99, this program reads 1 and 2")]


DAMAGES = {  # the file, what is done to its bytes, and what is said
    "items broken in the middle": ("items.parquet", lambda b: b[:40] + bytes(16) + b[56:], "it has changed since"),
    "layers broken": ("layers.json", lambda b: b.replace(b"3", b"4"), "changed since it was written"),
    "a word for a metric": ("metrics.json", lambda _: b'{"probe.accuracy": "high"}', "probe.accuracy: Input should be"),
    "a list of metrics": ("metrics.json", lambda _: b"[1]", "the whole: Input should be"),
    "no seed": ("config.yaml", lambda b: b.replace(b"seed: 0\n", b""), "seed: Field required"),
    "a seed in words": ("config.yaml", lambda b: b.replace(b"seed: 0", b"seed: one"), "seed: Input should be"),
    "no choices": ("config.yaml", lambda b: b.replace(b"choices", b"chosen"), "choices: Field required"),
    "no model chosen": ("config.yaml", lambda b: b.replace(b"  model: m\n", b""), "choices.model: Field required"),
    "a suite without settings": ("config.yaml", lambda b: b.replace(b"probe: {}", b"probe: 3"), "eval.probe: Input"),
    "a suite without report": ("report.json", lambda b: b.replace(b"probe", b"atlas"), "eval.probe: Field required"),
    "settings of a few lines and a million values": (
        "config.yaml",
        lambda b: (
            b
            + b"a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 12))
        ),
        "more than 1,000,000 values",
    ),
    "settings that hold themselves": ("config.yaml", lambda b: b + b"self: &s [*s]\n", "it contains itself"),
    "settings without end": ("config.yaml", lambda b: b + b"deep: " + b"[" * 200 + b"]" * 200, "deeper than 100"),
    "a report without model": ("report.json", lambda b: b.replace(b'"model"', b'"modal"'), "model: Field required"),
    "a sparsity of two": ("report.json", lambda b: b.replace(b"0.5", b"2.5"), "compression.sparsity: Input should be"),
    "half of a pair of code units": (
        "report.json",
        lambda b: b.replace(b'"m"', b'"\\ud800"'),
        "surrogates not allowed",
    ),
    "no text": ("report.json", lambda b: b"\xff\xfe" + b, "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_named_skipped_and_counted(tmp_path: Path, damage: str) -> None:
    store = RunStore(tmp_path)
    for run_id in ("a1", "b2"):
        run = made(run_id)
        run.report["compression"] = {"sparsity": 0.5, "layers": [{"path": "a", "removed": 3}]}
        store.write(run)
    name, change, said = DAMAGES[damage]
    file = store.runs_folder / "a1" / name
    before = file.read_bytes()
    file.write_bytes(change(before))
    assert file.read_bytes() != before
    runs, skipped = store.scan()
    assert [run.id for run in runs] == ["b2"]
    ((run_id, why),) = skipped
    assert run_id == "a1" and why.startswith(f"damaged: {name} cannot be read (") and said in why and "\n" not in why
    assert store.find("a1") is None and "a1" not in store and store.look_up("a1") == why


def test_without_digests_the_large_files_are_read_to_be_believed(tmp_path: Path) -> None:
    """As in the stores that early versions wrote: a table whose pages are broken and whose ends are whole."""
    store = RunStore(tmp_path)
    run = made()
    run._items = pl.concat([ITEMS.with_columns(id=pl.lit(f"{i}")) for i in range(500)])
    run.report["compression"] = {"layers": [{"path": "a"}]}
    store.write(run)
    environment = store.runs_folder / "a1" / "environment.json"
    told = json.loads(environment.read_text())
    del told["digests"]
    environment.write_text(json.dumps(told))
    assert "a1" in store
    items, layers = (store.runs_folder / "a1" / name for name in ("items.parquet", "layers.json"))
    whole = items.read_bytes()
    items.write_bytes(whole[:4] + bytes(400) + whole[404:])
    assert "items.parquet cannot be read" in str(store.look_up("a1"))
    items.write_bytes(whole)
    layers.write_text('[{"path": 7}]')
    assert "layers.json cannot be read (0.path: Input should be" in str(store.look_up("a1"))


def test_a_table_of_other_columns_is_no_run(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for change, said in (
        ({"correct": pl.lit("yes")}, "column correct is String, not Boolean"),
        ({"id": pl.lit(1)}, "column id is Int32, not String"),
    ):
        run = made()
        run._items = ITEMS.with_columns(**change)
        store.write(run)
        assert said in str(store.look_up("a1"))
    run._items = ITEMS.drop("task")
    store.write(run)
    assert "column task is missing" in str(store.look_up("a1"))


def test_figures_that_are_not_finite_leave_json_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    store = RunStore(tmp_path)
    run = made(x=math.nan, y=math.inf, z=1.0)
    run.report["compression"] = {"bits": math.nan, "layers": [{"path": "a", "error_after": -math.inf}]}
    store.write(run)
    for file in (store.runs_folder / "a1").glob("*.json"):
        json.loads(file.read_text(), parse_constant=refuse)
    found = store.find("a1")
    assert found is not None and math.isnan(found.metrics["x"]) and math.isnan(found.metrics["y"])
    assert found.metrics["z"] == 1.0 and found.layers == [{"path": "a", "error_after": None}]
    place = Workplace(tmp_path / "b2")
    kept = place.evaluation("probe", lambda: Evaluation({"x": math.nan}, ITEMS, {"low": -math.inf}))
    json.loads((place.folder / ".kept" / "probe.json").read_text(), parse_constant=refuse)
    again = place.evaluation("probe", lambda: pytest.fail("asked again"))
    assert math.isnan(kept.metrics["x"]) and math.isnan(again.metrics["x"])


@pytest.mark.parametrize(("kind", "content"), [("json", b"{"), ("json", b"[]"), ("json", b"{}"), ("parquet", b"PAR1")])
def test_what_an_interrupted_run_kept_and_is_damaged_is_asked_anew(tmp_path: Path, kind: str, content: bytes) -> None:
    place = Workplace(tmp_path / "a1")
    place.evaluation("probe", lambda: Evaluation({"x": 1.0}, ITEMS))
    (place.folder / ".kept" / f"probe.{kind}").write_bytes(content)
    assert place.evaluation("probe", lambda: Evaluation({"x": 2.0}, ITEMS)).metrics == {"x": 2.0}
    assert place.evaluation("probe", lambda: pytest.fail("asked again")).metrics == {"x": 2.0}
