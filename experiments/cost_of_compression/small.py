"""Table, figures and findings of The Cost of Compression on two small real models, from their finished runs.

python experiments/cost_of_compression/small.py outputs/cost_of_compression_small experiments/cost_of_compression
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from knowledge_compression.analysis.claims import CLAIMS
from knowledge_compression.analysis.comparisons import Group, compare
from knowledge_compression.analysis.figures import draw
from knowledge_compression.analysis.findings import check
from knowledge_compression.analysis.markdown import findings
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.statistics import drop

MARKER = "<!-- what follows is written by small.py -->\n"


def main(store: Path, folder: Path) -> None:
    """Read the runs under ``store`` and write the study's table, figures and findings into ``folder``."""
    comparisons = compare(list(RunStore(store)))
    if not comparisons.groups:
        sys.exit(f"error: {store} holds no dense run with compressed ones beside it; run the presets first")
    figures = draw(comparisons, folder / "figures")
    for path in list(figures):  # a README shows pictures, and those of 22 relations are for the page
        if path.suffix != ".svg" or path.stem.endswith("_by_data_set"):
            path.unlink()
            figures.remove(path)
    claims = [claim for claim in CLAIMS if "Cost of Compression" in claim.source]
    text = [line for group in comparisons for line in table(group)]
    text += [f"![{path.stem}](figures/{path.name})" for path in figures]
    text += ["", "## The paper's claims", "", *findings(check(comparisons, claims))]
    readme = folder / "README.md"
    written_by_hand = readme.read_text(encoding="utf-8").partition(MARKER)[0]
    readme.write_text(written_by_hand + MARKER + "\n".join(["", *text]) + "\n", encoding="utf-8")


def table(group: Group) -> Iterator[str]:
    """Every setting of a model and suite: right answers, and the drop against the dense model with its interval."""
    dense, suite = group.correct(group.dense), group.asked.suite
    majority = group.dense.metrics[f"{suite}.majority"]
    yield f"### {group.asked.model}, {group.asked.name}"
    yield ""
    known = f"Dense: {100 * dense.mean():.1f} % of {len(dense)} items"
    yield f"{known}; always saying the most frequent answer: {100 * majority:.1f} %."
    yield ""
    yield "| target | compression | sparsity | right (%) | drop (% of dense, 95 %) |"
    yield "| --- | --- | --- | --- | --- |"
    for run in sorted(group.runs, key=_order):
        correct, lost = group.correct(run), drop(dense, group.correct(run))
        target, compression, sparsity = _order(run)
        interval = f"{lost.value:+.1f} [{lost.low:+.1f}, {lost.high:+.1f}]"
        yield f"| {target} | {compression} | {sparsity:.0%} | {100 * correct.mean():.1f} | {interval} |"
    yield ""


def _order(run: Run) -> tuple[str, str, float]:
    choices = run.config["choices"]
    pruned = choices["compression"] != "int8_dynamic"  # the setting is there, and unused
    return choices["target"], choices["compression"], float(run.config["sparsity"]) if pruned else 0.0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
