"""What each recovery makes of a compressed model, from the finished runs of the small presets.

python experiments/forgotten_or_displaced/small.py outputs/forgotten_or_displaced experiments/forgotten_or_displaced
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.claims import CLAIMS
from knowledge_compression.analysis.comparisons import Group, compare
from knowledge_compression.analysis.fates import recoveries
from knowledge_compression.analysis.findings import check
from knowledge_compression.analysis.markdown import percent, points
from knowledge_compression.analysis.naming import label
from knowledge_compression.results.store import RunStore
from knowledge_compression.statistics import accuracy, mean_difference

MARKER = "<!-- what follows is written by small.py -->"
HEADS = ["recovery", "trained parameters", "right (95 %)", "change (points)", "lost facts restored"]


def main(store: Path, folder: Path) -> None:
    """Read the runs under ``store`` and write the tables and findings into ``folder``'s README."""
    comparisons = compare(list(RunStore(store)))
    text = [line for group in comparisons for line in tables(group)]
    if not text:
        sys.exit(f"error: {store} holds no compressed run with recoveries of it and a dense one; run the presets first")
    claims = [claim for claim in CLAIMS if "Forget" in claim.source]
    text += ["## The paper's claims", "", *markdown.findings(check(comparisons, claims))]
    markdown.write_below(MARKER, text, folder / "README.md")


def tables(group: Group) -> Iterator[str]:
    """For every compressed model that was recovered, what each recovery gives."""
    if group.asked.suite not in ("world", "nine_tasks"):
        return
    dense = group.correct(group.dense)
    for compressed, tried in recoveries(group):
        before = group.correct(compressed)
        lost = dense & ~before
        yield f"### {label(compressed)}, {group.asked.name}"
        yield ""
        known = f"Dense: {percent(accuracy(dense))} of {len(dense)} items right"
        yield f"{known}; compressed: {percent(accuracy(before))}, which lost {lost.sum()} that the dense model knows."
        yield ""
        rows = []
        for name, run in sorted(tried.items()):
            after = group.correct(run)
            change = points(mean_difference(after.astype(float) - before))
            restored = percent(accuracy(after[lost])) if lost.any() else "none lost"
            trained = run.report["recovery"].get("trainable_parameters", 0)
            rows.append([name, f"{trained:,}", percent(accuracy(after)), change, restored])
        yield from markdown.table(HEADS, rows)
        yield ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
