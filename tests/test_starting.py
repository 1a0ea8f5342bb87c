"""The tests can be started in any way: bare, from any folder, one file alone, with workers and without.

As a module in the root is how ``make test`` starts them, and one folder without workers how ``make test-slurm`` does,
so those ways are tried whenever they run.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.places import EXHAUSTIVE, TESTS


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_file_imports_a_test_module_or_conftest(path: Path) -> None:
    """Such a module would be found from some folders only, or exist twice; what is shared lies in ``helpers``."""
    for name in imported(path):
        assert name.split(".")[0] not in ("tests", "conftest"), name
        assert not name.split(".")[-1].startswith("test_"), name
        assert not name.startswith("."), name


@pytest.mark.slow
@pytest.mark.skipif(
    not EXHAUSTIVE, reason="make test and make test-slurm start them in two ways (KC_TEST_EXHAUSTIVE=1)"
)
@pytest.mark.parametrize(
    ("start", "folder"),
    [(["pytest"], TESTS.parent), (["pytest", "-n", "1"], TESTS)],
    ids=["bare in the root", "with workers in tests"],
)
def test_a_file_alone(start: list[str], folder: Path) -> None:
    """The bare command is the one of this environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    file = str((TESTS / "models" / "test_held.py").relative_to(folder))
    command = [*start, "-p", "no:cacheprovider", file, "-k", "llama"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout
