"""The table of `docs/formats.md`: what was asked anew replaces its earlier row, and every other row stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

BEGIN, END = "<!-- peers: made by experiments/format_peers/study.py -->", "<!-- peers: end -->"


def put(page: Path, headings: Sequence[str], asked: Mapping[tuple[str, str], str], known: Sequence[tuple[str, str]]):
    """Write rows into the page.

    Args:
        page: a page that has the marks of the table.
        headings: the first lines of the table.
        asked: rows by file and peer.
        known: the rows that the table may have, in order; earlier rows of others are dropped.
    """
    before, _, rest = page.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = {key: row for row in table.splitlines() for key in known if _is(row, *key)} | dict(asked)
    lines = [*headings, *(rows[key] for key in known if key in rows)]
    page.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]))


def _is(row: str, file: str, peer: str) -> bool:
    """Whether a row is that of a file and a peer, whose versions begin with its name."""
    start = f"| {file} | "
    return row.startswith(start) and row[len(start) :].replace("-", "_").startswith(peer)
