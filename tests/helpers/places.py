"""Where the checkout's parts lie, for tests in any folder, and how much is tested."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONF, DOCS, PACKAGE, TESTS = ROOT / "conf", ROOT / "docs", ROOT / "knowledge_compression", ROOT / "tests"
PARTS = TESTS / "parts"  # what sweeps are tested with
EXHAUSTIVE = os.environ.get("KC_TEST_EXHAUSTIVE") == "1"  # every member of a family, not one that stands for it
