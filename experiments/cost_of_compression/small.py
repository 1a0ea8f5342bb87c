"""Table, figures and findings of The Cost of Compression on two small real models, from their finished runs.

python experiments/cost_of_compression/small.py outputs/cost_of_compression_small experiments/cost_of_compression
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.claims import CLAIMS
from knowledge_compression.analysis.comparisons import Group, compare
from knowledge_compression.analysis.figures import draw
from knowledge_compression.analysis.findings import check
from knowledge_compression.analysis.markdown import percent
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import accuracy, drop

MARKER = "<!-- what follows is written by small.py -->"


def main(store: Path, folder: Path) -> None:
    """Read the runs under ``store`` and write the study's table, figures and findings into ``folder``."""
    comparisons = compare(list(RunStore(store)))
    if not comparisons.groups:
        sys.exit(f"error: {store} holds no dense run with compressed ones of the same model; run the presets first")
    figures = draw(comparisons, folder / "figures")
    for path in list(figures):  # a README shows pictures, and those of 22 relations are for the page
        if path.suffix != ".svg" or path.stem.endswith("_by_data_set"):
            path.unlink()
            figures.remove(path)
    claims = [claim for claim in CLAIMS if "Cost of Compression" in claim.source]
    text = [line for group in comparisons for line in table(group)]
    text += [f"![{path.stem}](figures/{path.name})" for path in figures]
    text += ["", "## The paper's claims", "", *markdown.findings(check(comparisons, claims))]
    markdown.write_below(MARKER, text, folder / "README.md")


def table(group: Group) -> Iterator[str]:
    """Every setting of a model and suite: right answers, and the drop against the dense model, with intervals."""
    dense, suite = group.correct(group.dense), group.asked.suite
    majority = 100 * group.dense.metrics[f"{suite}.majority"]
    yield f"### {group.asked.model}, {group.asked.name}"
    yield ""
    known = f"Dense: {percent(accuracy(dense))} of {len(dense)} items"
    yield f"{known}; always saying the most frequent answer: {majority:.1f} %."
    yield ""
    rows = []
    for run in sorted(group.runs, key=_order):
        correct, lost = group.correct(run), drop(dense, group.correct(run))
        target, compression, sparsity = _order(run)
        interval = f"{lost.value:+.1f} [{lost.low:+.1f}, {lost.high:+.1f}]"
        rows.append([target, compression, f"{sparsity:.0%}", percent(accuracy(correct)), interval])
    yield from markdown.table(["target", "compression", "sparsity", "right (95 %)", "drop (% of dense, 95 %)"], rows)
    yield ""


def _order(run: Run) -> tuple[str, str, float]:
    choices = run.config["choices"]
    pruned = choices["compression"] != "int8_dynamic"  # the setting is there, and unused
    return choices["target"], choices["compression"], float(run.config["sparsity"]) if pruned else 0.0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
