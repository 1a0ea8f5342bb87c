"""Every command of the package answers bad input with one line and status 2, and leaves nothing half-written."""

from __future__ import annotations

import importlib

import pytest

from helpers.stores import bits, made_run
from knowledge_compression import doctor
from knowledge_compression.results.store import RunStore

READERS = ("report", "advise", "status")


def said_by(command, arguments, capsys) -> str:
    """What a command says on standard error before it ends with status 2."""
    program = importlib.import_module(f"knowledge_compression.{command}")
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


@pytest.mark.parametrize("command", [*READERS, "doctor"])
def test_an_option_that_does_not_exist_is_refused(command, capsys):
    assert "--nonsense" in said_by(command, ["somewhere", "--nonsense"][command == "doctor" :], capsys)


def test_a_store_without_a_dense_run_is_one_line_for_advice_and_a_page_that_says_so(tmp_path, capsys):
    store = RunStore(tmp_path / "outputs")
    store.write(made_run(bits("10"), id="alone000"))
    said = said_by("advise", [store.folder], capsys)
    assert "no dense run" in said and said.count("\n") == 1
    importlib.import_module("knowledge_compression.report").main([str(store.folder)])
    assert "alone000" in (tmp_path / "report.html").read_text()


def test_the_doctor_sees_a_file_in_the_way_of_the_outputs(tmp_path):
    (tmp_path / "file").write_text("in the way")
    checks = {check.name: check for check in doctor.examine(tmp_path / "file" / "outputs", None)}
    assert checks["outputs"].state == doctor.BROKEN and checks["outputs"].remedy
