"""What a fresh installation gets is what the code imports."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from helpers.places import ROOT

OWN = {"knowledge_compression", "hydra_plugins"}


def imported() -> set[str]:
    found = set()
    for path in [ROOT / "run.py", *(file for own in OWN for file in (ROOT / own).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - OWN - set(sys.stdlib_module_names)


def test_every_library_that_is_imported_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=!~\[ ]", one, maxsplit=1)[0].lower().replace("_", "-") for one in declared}
    carriers = packages_distributions()
    undeclared = {
        module
        for module in imported()
        if not names & {name.lower().replace("_", "-") for name in carriers.get(module, [])}
    }
    assert not undeclared


@pytest.mark.slow
def test_an_installed_package_works_from_an_empty_folder(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    ignored = shutil.ignore_patterns(".*", "outputs", "*.egg-info", "build", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, timeout=300)
    (tmp_path / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(site), "KC_CACHE_DIR": str(tmp_path / "cache")}
    program = (
        "import knowledge_compression as kc; print(kc.__file__); print(kc.choose('target=att').name);"
        "from knowledge_compression.commands import main; import sys; sys.argv = ['kc', 'run', '--cfg', 'job']; main()"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "empty",
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout
    assert told.startswith(str(site)) and "\natt\n" in told and "name: smollm2" in told
