"""Where the checkout's parts lie, for tests in any folder."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONF, DOCS, PACKAGE, TESTS = ROOT / "conf", ROOT / "docs", ROOT / "knowledge_compression", ROOT / "tests"
PARTS = TESTS / "parts"  # what sweeps are tested with
