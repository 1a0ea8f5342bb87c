"""What each recovery makes of a compressed model, from finished runs: tables, figures and findings as one page.

python experiments/forgotten_or_displaced/small.py STORE PAGE [SUITE ...]
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.claims import CLAIMS
from knowledge_compression.analysis.comparisons import Comparisons, Group, compare
from knowledge_compression.analysis.fates import OVERALL, RESTORED, recoveries, shares_restored
from knowledge_compression.analysis.findings import check
from knowledge_compression.analysis.markdown import percent, points
from knowledge_compression.analysis.measures import ANSWERS
from knowledge_compression.analysis.metrics import with_intervals
from knowledge_compression.analysis.recovery_figures import RECOVERY_FIGURES
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.results.varying import Names
from knowledge_compression.statistics import accuracy, difference_of_means, mean_difference


def main(store: Path, page: Path, suites: Collection[str]) -> None:
    """Read the runs under ``store`` and write ``page`` about some suites or all; its figures go into ``figures``."""
    comparisons = compare(list(RunStore(store)))
    if suites:
        comparisons.groups = [group for group in comparisons.groups if group.asked.suite in suites]
        comparisons.measured = [group for group in comparisons.measured if group.asked.suite in suites]
    groups = [*comparisons.groups, *comparisons.measured]
    text = [line for group in groups for line in tables(group, comparisons.names)]
    if not text:
        sys.exit(f"error: {store} holds no compressed run with recoveries of it and a dense one; run the presets first")
    if drawn := list(pictures(comparisons, page)):
        text += ["## Figures", "", *drawn, ""]
    claims = [claim for claim in CLAIMS if "Forget" in claim.source]
    text += ["## The paper's claims", "", *markdown.findings(check(comparisons, claims)), ""]
    heading = f"# {page.stem.replace('_', ' ').capitalize()}"
    page.write_text(
        "\n".join([heading, "", "Written by `small.py` from the runs that the README names.", "", *text]), "utf-8"
    )


def pictures(comparisons: Comparisons, page: Path) -> Iterator[str]:
    """Draw the paper's figures as far as there are runs for them."""
    folder = page.parent / "figures"
    folder.mkdir(exist_ok=True)
    tasks = any(group.asked.suite == "nine_tasks" for group in comparisons)
    for name, make in RECOVERY_FIGURES.items():
        if name.endswith("_by_data_set") and not tasks:  # relations are too many for a page
            continue
        if figure := make(comparisons):
            path = folder / f"{page.stem}_{name}.svg"
            figure.savefig(path)
            yield f"![{name.replace('_', ' ')}](figures/{path.name})"


def tables(group: Group, names: Names) -> Iterator[str]:
    """For every compressed model that was recovered, what each recovery gives."""
    rows_of = of_answers if group.measure is ANSWERS else of_values
    for compressed, tried in recoveries(group):
        yield f"## {names.of(compressed.id, ('seed', 'eval'))}, {group.asked.name}"
        yield ""
        yield from rows_of(group, compressed, tried)
        yield ""


def of_answers(group: Group, compressed: Run, tried: Mapping[str, Run]) -> Iterator[str]:
    """The lost answers, those of them that came back, and those that came although neither model had them."""
    dense, before = group.correct(group.dense), group.correct(compressed)
    lost, never = dense & ~before, ~dense & ~before
    known = f"Dense: {percent(accuracy(dense))} of {len(dense)} items right"
    yield f"{known}; compressed: {percent(accuracy(before))}, which lost {lost.sum()} that the dense model knows."
    yield ""
    rows = []
    for name, run in sorted(tried.items()):
        after = group.correct(run)
        change = points(mean_difference(after.astype(float) - before))
        restored, new = (percent(accuracy(after[part])) if part.any() else "none" for part in (lost, never))
        rows.append([name, trained(run), percent(accuracy(after)), change, restored, new])
    columns = [
        "recovery",
        "trained parameters",
        "right (95 %)",
        "change (points)",
        "of those lost, right",
        "of those never right, right",
    ]
    yield from markdown.table(columns, rows)
    for row in shares_restored(group):
        if (row["compressed"], row["value"]) == (compressed.id, OVERALL) and row["lost"]:
            shares = zip(RESTORED, row["shares"], strict=True)
            yield ""
            yield (
                f"Of the {row['lost']} lost, restored "
                + ", ".join(f"{how} {percent(share)}" for how, share in shares)
                + "."
            )


def of_values(group: Group, compressed: Run, tried: Mapping[str, Run]) -> Iterator[str]:
    """Perplexity, similarity or time, for suites without right answers."""
    measure, suite = group.measure, group.asked.suite
    difference = (lambda one, other: mean_difference(one - other)) if measure.paired else difference_of_means
    metrics = with_intervals([group.dense, compressed, *tried.values()])

    def shown(run: Run) -> str:
        value, interval = metrics[run.id][f"{suite}.{measure.metric}"]
        return f"{value:.3g} [{interval.low:.3g}, {interval.high:.3g}]" if interval else f"{value:.3g}"

    name = measure.metric.replace("_", " ")
    yield f"Dense: {name} {shown(group.dense)}; compressed: {shown(compressed)}; changes are from the latter."
    yield ""
    before = group.gains(compressed)
    rows = []
    for recovery, run in sorted(tried.items()):
        after = group.gains(run)
        changes = [difference(after[part], before[part]) for _, part in group.data_sets]
        rows.append([recovery, trained(run), shown(run), *map(measure.words, changes)])
    parts = [f"change, {part}" for part, _ in group.data_sets]
    yield from markdown.table(["recovery", "trained parameters", f"{name} (95 %)", *parts], rows)


def trained(run: Run) -> str:
    return f"{run.report['recovery'].get('trainable_parameters', 0):,}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
