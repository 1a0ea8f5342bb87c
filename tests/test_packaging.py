"""What a fresh installation gets is what the code imports."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
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
