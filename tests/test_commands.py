"""Every command of the package answers bad input with one line and status 2, and leaves nothing half-written."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

import pytest

from helpers.stores import bits, made_run
from knowledge_compression import commands, doctor
from knowledge_compression.commands import SUBCOMMANDS
from knowledge_compression.results.store import RunStore
from knowledge_compression.sweeping.plan import PlannedRun, write_plan
from knowledge_compression.sweeping.status import sweeps

READERS = ("report", "advise", "status")


def said_by(command, arguments, capsys) -> str:
    """What a command says on standard error before it ends with status 2."""
    program = importlib.import_module(SUBCOMMANDS[command][0])
    with pytest.raises(SystemExit) as end:
        raise SystemExit(program.main([str(word) for word in arguments]))
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_folder_that_is_none_is_one_line_that_names_it(command, kind, tmp_path, capsys):
    place = tmp_path / "outputs"
    if kind == "a file":
        place.write_text("not a folder")
    said = said_by(command, [place], capsys)
    assert said.startswith("error: ") and said.count("\n") == 1 and str(place) in said
    assert [path.name for path in tmp_path.iterdir()] == (["outputs"] if kind == "a file" else [])


@pytest.mark.parametrize("command", [name for name in SUBCOMMANDS if name != "run"])
def test_the_help_is_plain_text_that_names_the_command(command, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(SUBCOMMANDS[command][0]).main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and said.count(f"kc {command}") > 1 and "`" not in said


@pytest.mark.parametrize("command", [*READERS, "doctor"])
def test_an_option_that_does_not_exist_is_refused(command, capsys):
    assert "--nonsense" in said_by(command, ["somewhere", "--nonsense"][command == "doctor" :], capsys)


def test_a_store_without_a_dense_run_is_one_line_for_advice_and_a_page_that_says_so(tmp_path, capsys):
    store = RunStore(tmp_path / "outputs")
    store.write(made_run(bits("10"), id="alone000"))
    said = said_by("advise", [store.folder], capsys)
    assert "no dense run" in said and said.count("\n") == 1
    importlib.import_module(SUBCOMMANDS["report"][0]).main([str(store.folder)])
    assert "alone000" in (tmp_path / "report.html").read_text()


@pytest.fixture
def damaged(tmp_path):
    """A store of a sweep with a dense run, one that is whole, and one of each damage."""
    store = RunStore(tmp_path / "outputs")
    ids = ["whole000", "items000", "metric00", "config00", "version0"]
    for run_id in ids:
        store.write(made_run(bits("1011"), id=run_id))
    store.write(made_run(bits("1111"), compression="none", id="dense000"))
    runs = store.runs_folder
    items = (runs / "items000" / "items.parquet").read_bytes()
    (runs / "items000" / "items.parquet").write_bytes(items[:60] + bytes(32) + items[92:])
    (runs / "metric00" / "metrics.json").write_text('{"atlas.accuracy": "high"}')
    config = (runs / "config00" / "config.yaml").read_text()
    (runs / "config00" / "config.yaml").write_text(config.replace("seed: 0\n", ""))
    (runs / "version0" / "environment.json").write_text('{"format": 99}')
    folder = store.folder / "sweeps" / "2026-01-01"
    folder.mkdir(parents=True)
    write_plan(folder, [PlannedRun([f"id={run_id}"], run_id, "dense000") for run_id in ids], at_once=1)
    return store.folder


REASONS = {
    "items000": "damaged: items.parquet cannot be read",
    "metric00": "damaged: metrics.json cannot be read (atlas.accuracy: Input should be a valid number)",
    "config00": "damaged: config.yaml cannot be read (seed: Field required)",
    "version0": "of another version: its format is 99, this program reads 1 and 2",
}


@pytest.mark.parametrize("command", ["report", "advise", "status", "dashboard"])
def test_damaged_runs_are_named_and_counted_and_the_others_are_told(command, damaged, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = {"report": ["--figures", "figures"], "dashboard": ["--json"]}.get(command, [])
    status = importlib.import_module(SUBCOMMANDS[command][0]).main([str(damaged), *arguments])
    said = "".join(capsys.readouterr())
    assert status == (1 if command == "status" else status) and "Traceback" not in said
    if command == "report":
        assert "2 runs, 4 folders left out" in said
        page, findings = Path("report.html").read_text(), Path("figures/findings.md").read_text()
        assert all(f"<code>{run_id}</code>: {escape(why)}" in page for run_id, why in REASONS.items())
        assert all(why.partition(" (")[0] in findings for why in REASONS.values())
    else:
        assert all(run_id in said and why in said for run_id, why in REASONS.items())
    if command == "status":
        (found,) = sweeps(damaged)
        assert found.states == ["done", *["damaged"] * 4] and any(
            "damaged ┃ time left" in line for line in said.splitlines()
        )


@pytest.mark.parametrize("file", ["plan.json", "0/outcome.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"runs": 3}', '{"at_once": 1, "runs": [{"id": 3}]}'])
def test_a_damaged_sweep_is_named_and_the_others_are_told(file, content, damaged, capsys):
    broken = damaged / "sweeps" / "2026-01-02"
    shutil.copytree(damaged / "sweeps" / "2026-01-01", broken)
    (broken / "0").mkdir()
    (broken / file).write_text(content)
    for command, arguments in (("status", []), ("dashboard", ["--json", "--sweep", "2026-01-01"])):
        importlib.import_module(SUBCOMMANDS[command][0]).main([str(damaged), *arguments])
        said = "".join(capsys.readouterr())
        assert "2026-01-01" in said and "Traceback" not in said
        if command == "status":
            assert f"2026-01-02/{file} cannot be read" in said.replace("\n", "")
    if file == "plan.json":
        said = said_by("dashboard", [damaged, "--json", "--sweep", "2026-01-02"], capsys)
        assert said.startswith("error: ") and said.count("\n") == 1 and "plan.json cannot be read" in said


def test_the_doctor_sees_a_file_in_the_way_of_the_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr("knowledge_compression.models.device._SIDE", 128)  # bfloat16 may take seconds
    (tmp_path / "file").write_text("in the way")
    checks = {check.name: check for check in doctor.examine(tmp_path / "file" / "outputs", None)}
    assert checks["outputs"].state == doctor.BROKEN and checks["outputs"].remedy


@pytest.mark.parametrize("command", ["report", "advise --keep 95%"])
def test_a_store_that_only_another_user_may_read_is_one_line(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "runs").mkdir()

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    name, *options = command.split()
    monkeypatch.setattr("sys.argv", ["kc", name, str(tmp_path), *options])
    assert commands.main() == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {tmp_path / 'runs'}: Permission denied"]


def test_a_reader_that_has_seen_enough_gets_no_stack_trace(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "knowledge_compression", "status", str(tmp_path)]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")
