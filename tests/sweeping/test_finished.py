"""Whoever asks for a run that is finished waits for none of the libraries that doing it takes."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import commands
from helpers.places import CONF, ROOT
from knowledge_compression import heavy
from knowledge_compression.models import device

HEAVY = (
    "torch",
    "transformers",
    "polars",
    "lm_eval",
    "peft",
    "wandb",
    "matplotlib",
    "scipy",
    "statsmodels",
    "datasets",
)
PARTS = sorted({part for path in (CONF).rglob("*.yaml") for part in re.findall(r"_target_: *(\S+)", path.read_text())})
COMMAND = """
import atexit, json, runpy, sys
file, heavy = sys.argv[1], sys.argv[2].split(",")
atexit.register(lambda: open(file, "w").write(json.dumps([name for name in heavy if name in sys.modules])))
sys.argv = ["run.py", *sys.argv[3:]]
runpy.run_path("run.py", run_name="__main__")
"""


def loaded(code: str, *arguments: str) -> list[str]:
    """The heavy libraries that a fresh process has at its end."""
    code += f"\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    return found


def test_what_a_part_is_can_be_said_without_them() -> None:
    assert len(PARTS) > 40
    modules = {part.rpartition(".")[0] for part in PARTS} | {"knowledge_compression.experiment"}
    assert loaded("\n".join(f"import {module}" for module in sorted(modules))) == []


@pytest.fixture
def command(tmp_path: Path, tiny_folder: Path) -> Any:
    """``command(...)`` runs ``run.py``; gives what it printed and the heavy libraries that it had at its end."""
    environment = os.environ | {"KC_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    program, file = tmp_path / "program.py", tmp_path / "loaded.json"
    program.write_text(COMMAND)

    def run(*arguments: str, start: Any = commands.run_anew) -> tuple[str, list[str]]:
        given = ["model=local", f"model.path={tiny_folder}", "device=cpu", f"output.dir={tmp_path / 'out'}"]
        command = [str(program), str(file), ",".join(HEAVY), *arguments, *given]
        done = start(*command, folder=ROOT, environment=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads(file.read_text())

    return run


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["target=all"], ["-m", "target=all", "sparsity=0.2,0.4"]], ids=["run", "sweep"])
def test_a_finished_run_is_shown_without_them(command: Any, tmp_path: Path, arguments: list[str]) -> None:
    first, needed = command(*arguments, start=commands.run)
    assert {"torch", "transformers", "polars"} <= set(needed)
    sweeps = sorted((tmp_path / "out").glob("sweeps/*"))
    again, taken = command(*arguments)
    assert taken == []

    def table(said: str) -> list[str]:
        return [line for line in said.splitlines() if line.startswith(("│", "┃"))]

    assert table(again) == table(first) != []
    if "-m" in arguments:  # the second sweep has its table and figures, too
        (new,) = set((tmp_path / "out").glob("sweeps/*")) - set(sweeps)
        files = {path.name for path in new.iterdir()}
        assert files >= {"plan.json", "table_by_sparsity.csv", "drop_by_sparsity.png", "drop_by_sparsity.svg"}
        assert (new / "table_by_sparsity.csv").read_bytes() == (sweeps[0] / "table_by_sparsity.csv").read_bytes()


def test_a_heavy_library_is_itself_where_it_is_used() -> None:
    import polars
    import torch

    assert heavy.torch.Tensor is torch.Tensor and heavy.nn.Module is torch.nn.Module and heavy.pl.col is polars.col
    with pytest.raises(AttributeError, match="no_such_thing"):
        heavy.torch.no_such_thing  # noqa: B018


@pytest.mark.parametrize(
    ("system", "built", "driver", "may"),
    [
        ("linux", {"cuda": None, "hip": None}, True, False),
        ("linux", {"cuda": "12.8", "hip": None}, False, False),
        ("linux", {"cuda": "12.8", "hip": None}, True, True),
        ("linux", {"cuda": None, "hip": "6.4"}, False, True),
        ("darwin", {"cuda": None, "hip": None}, False, True),
    ],
)
def test_torch_is_asked_for_a_gpu_only_where_there_may_be_one(
    monkeypatch: pytest.MonkeyPatch, system: str, built: dict[str, Any], driver: bool, may: bool
) -> None:
    def load(name: str) -> None:
        if not driver:
            raise OSError(name)

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(device, "run_path", lambda path: built)
    monkeypatch.setattr(ctypes, "CDLL", load)
    device._may_have_gpu.cache_clear()
    assert device._may_have_gpu() is may
    device._may_have_gpu.cache_clear()


def test_the_kind_of_device_is_that_of_torch() -> None:
    assert device.kind_of("auto") == device.resolve_device("auto").type
    assert device.kind_of("cpu") == "cpu"
