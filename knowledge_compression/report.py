"""One HTML page about all runs of a store: kc report outputs/ -o report.html."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_compression.errors import BadInput
from knowledge_compression.progress import underway

if TYPE_CHECKING:
    from knowledge_compression.analysis.comparisons import Comparisons


def main(arguments: list[str] | None = None) -> None:
    """Write one self-contained HTML file about all finished runs; bad input is one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="kc report", description=__doc__)
    parser.add_argument("outputs", type=Path, help="the outputs folder, with runs/ inside")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="the file to write (default: report.html)"
    )
    parser.add_argument("--figures", type=Path, help="also write tables, figures and what to cite into this folder")
    parser.add_argument(
        "--per-parameter", action="store_true", help="divide drops in the figures by the share of parameters touched"
    )
    options = parser.parse_args(arguments)
    try:
        write_report(options.outputs, options.output)
        if options.figures:
            write_figures(options.outputs, options.figures, per_parameter=options.per_parameter)
    except BadInput as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def write_report(outputs: Path, output: Path) -> None:
    """Write the page about the runs of ``outputs``.

    Raises:
        BadInput: there are no finished runs, or the file cannot be written.
    """
    from knowledge_compression.analysis.page import render, write
    from knowledge_compression.results.store import RunStore

    with underway("reading the runs"):
        runs, skipped = RunStore(outputs).scan()
    if not runs:
        unreadable = f" that can be read ({skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        raise BadInput(
            f"{outputs} holds no finished runs{unreadable}; give the folder that output.dir named (it has runs/ inside)"
        )
    with underway(f"comparing {len(runs)} runs"):
        html = render(runs, skipped)
    try:
        write(html, output)
    except OSError as error:
        raise BadInput(f"{output} cannot be written ({error.strerror})") from None
    left_out = f", {len(skipped)} folders left out (named on the page)" if skipped else ""
    sys.stdout.write(f"{output}: {len(runs)} runs{left_out}, {output.stat().st_size / 1e6:.1f} MB\n")


def write_figures(outputs: Path, folder: Path, *, per_parameter: bool = False) -> None:
    """Write all results as a table (CSV, LaTeX) and a figure (SVG, PDF), and those of both papers' for which there are
    runs.

    Also write, as Markdown, ``findings.md`` (findings, fates and what restored lost facts) and ``how_to_cite.md``.

    Raises:
        BadInput: the folder cannot be written.
    """
    from knowledge_compression.analysis import markdown, paper, tables
    from knowledge_compression.analysis.comparisons import compare
    from knowledge_compression.analysis.findings import check
    from knowledge_compression.analysis.naming import reading_order
    from knowledge_compression.results.store import RunStore

    with underway("drawing tables and figures"):
        runs, unreadable = RunStore(outputs).scan()
        comparisons = compare(sorted(runs, key=reading_order))
        comparisons.skipped[:0] = unreadable
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "findings.md").write_text(markdown.report(comparisons, check(comparisons)), encoding="utf-8")
            (folder / "how_to_cite.md").write_text(paper.how_to_cite(comparisons), encoding="utf-8")
            written = [folder / "findings.md", folder / "how_to_cite.md", *paper.draw(comparisons, folder)]
            for make in (paper.results_table, paper.values_table):
                written += tables.write(make(comparisons), folder)
            written += _papers(comparisons, folder, per_parameter)
        except OSError as error:
            raise BadInput(f"{folder} cannot be written ({error.strerror})") from None
    sys.stdout.write(f"{folder}: {len(written)} files\n")


def _papers(comparisons: Comparisons, folder: Path, per_parameter: bool) -> list[Path]:
    from knowledge_compression.analysis import figures, tables

    written = figures.draw(comparisons, folder, per_parameter=per_parameter)
    for make in tables.TABLES:
        written += tables.write(make(comparisons), folder)
    return written


if __name__ == "__main__":
    main()
