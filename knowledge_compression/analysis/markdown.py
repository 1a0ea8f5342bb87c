"""The findings and the fates of a store's facts as Markdown, for a study's README."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from knowledge_compression.analysis import kinds, wordings
from knowledge_compression.analysis.claims import FACTS, REASONING, Claim
from knowledge_compression.analysis.comparisons import Comparisons
from knowledge_compression.analysis.fates import OVERALL, RESTORED, shares_by_setting, shares_restored
from knowledge_compression.analysis.findings import Finding, Verdict
from knowledge_compression.analysis.tables import CALIBRATION, DISTANCES, calibration_table, distance_table, spaced
from knowledge_compression.statistics import Estimate


def report(comparisons: Comparisons, verdicts: Sequence[Verdict]) -> str:
    """All sections below; empty ones are left out."""
    sections = {
        "Findings": findings(verdicts),
        "Accuracy and what was lost": fates(comparisons),
        "What brought lost facts back": restored(comparisons),
        "Known in all, some or none of the wordings": by_fact(comparisons).lines(),
        "Facts lost in one wording and kept in another": displaced(comparisons).lines(),
        "Facts and reasoning under the same compression": facts_and_reasoning(comparisons).lines(),
        "Distance to the dense model": distances(comparisons),
        "Calibration": calibration(comparisons),
        "Left out": [f"- {_code(run)}: {plain(why)}" for run, why in comparisons.skipped],
    }
    return "\n".join("\n".join([f"## {title}", "", *lines, ""]) for title, lines in sections.items() if lines)


def findings(verdicts: Sequence[Verdict]) -> list[str]:
    """One row per claim and model: how much better the claimed setting does, and the verdict."""
    rows = [_finding(verdict.claim, finding) for verdict in verdicts for finding in verdict.findings]
    heads = ["", "claim", "model", "suite", "effect, 95 %", "p (Holm)", "items", "seeds", "pairs of runs"]
    silent = sum(not verdict.findings for verdict in verdicts)
    note = ["", f"Claims without runs in this store: {silent} of {len(verdicts)}."] if silent else []
    return [*table(heads, rows), *note] if rows else []


def fates(comparisons: Comparisons) -> list[str]:
    """One row per setting: accuracy, drop, flips, and the share of known facts lost, by frequency if items have it."""
    rows = []
    frequencies: list[str] = []
    for group in comparisons:
        by_run: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in shares_by_setting(group):
            by_run[row["run"]].append(row)
        for run in group.runs:
            shares = by_run[run.id]
            told = {row["value"]: row["lost"] for row in shares if row["by"] != "relation"}
            frequencies += [name for name in told if name not in (*frequencies, OVERALL)]
            cells = [
                plain(comparisons.names.of(run.id, ("seed", "eval"))),
                plain(group.asked.name),
                percent(group.accuracies[run.id]),
                percent(group.drops[run.id].through(lambda fall: fall / 100)),
                *(percent(shares[0][name]) for name in ("flips", "all_flips")),
            ]
            rows.append((cells, told))
    heads = [
        "run",
        "suite",
        "accuracy",
        "drop",
        "flips",
        "all flips",
        "lost, of the known",
        *(f"lost, {name}" for name in frequencies),
    ]
    return table(
        [*map(plain, heads)],
        [[*cells, *(percent(told.get(name)) for name in (OVERALL, *frequencies))] for cells, told in rows],
    )


def restored(comparisons: Comparisons) -> list[str]:
    """One row per recovered model: what restored the facts that it had lost."""
    rows = []
    for group in comparisons:
        names = {run.id: comparisons.names.of(run.id) for run in group.members}
        for row in shares_restored(group):
            told = [names[row["compressed"]], ", ".join(row["tried"]), row["value"], str(row["lost"])]
            rows.append([*map(plain, told), *map(percent, row["shares"])])
    return table(["compressed", "tried", "facts", "lost", *RESTORED], rows)


class Table(NamedTuple):
    """A table of text; each row has first the names, which come from the store, then the figures."""

    heads: list[str]
    rows: list[tuple[list[str], list[str]]]

    def lines(self) -> list[str]:
        """The table as Markdown; none where it has no rows."""
        return table(self.heads, [[*map(plain, names), *figures] for names, figures in self.rows])


def by_fact(comparisons: Comparisons) -> Table:
    """One row per run of a suite that asks facts in several wordings."""
    rows = []
    for group in comparisons:
        names = {run.id: comparisons.names.of(run.id) for run in group.members}
        for row in wordings.knowledge(group):
            figures = [f"{row['facts']:,}", *map(percent, row["known"]), percent(row["consistency"])]
            rows.append(([names[row["run"]], group.asked.name], figures))
    return Table(["run", "suite", "facts", *(f"known in {known}" for known in wordings.KNOWN), "consistency"], rows)


def displaced(comparisons: Comparisons) -> Table:
    """One row per recovered model and kind of recovery: did half-lost facts come back more often than others?"""
    rows = []
    for group in comparisons:
        names = {run.id: comparisons.names.of(run.id) for run in group.members}
        for row in wordings.brought_back(group):
            told = [names[row["compressed"]], group.asked.name, row["by"], ", ".join(row["tried"])]
            counts = [f"{percent(back)} of {n:,}" for back, n in zip(row["back"], row["facts"], strict=True)]
            difference = row["difference"]
            rows.append((told, [*counts, points(difference) if difference else ""]))
    heads = ["compressed", "suite", "recovered by", "tried", f"back, {wordings.HALF}", f"back, {wordings.WHOLLY}"]
    return Table([*heads, "difference, points"], rows)


def facts_and_reasoning(comparisons: Comparisons) -> Table:
    """One row per run that was asked both kinds of questions: what it keeps of each, above chance."""
    rows = []
    for row in kinds.by_kind(comparisons, (FACTS, REASONING)):
        told = [comparisons.names.of(row["run"], ("seed", "eval")), *row["suites"]]
        rows.append((told, [*map(percent, row["kept"]), points(row["difference"])]))
    heads = ["run", "facts asked", "reasoning asked", "facts kept", "reasoning kept", "facts less reasoning, points"]
    return Table(heads, rows)


def distances(comparisons: Comparisons) -> list[str]:
    """One row per run with ``distance=true``: how far its distributions lie from the dense model's."""

    rows = distance_table(comparisons).rows
    return table(["run", "suite", *map(spaced, DISTANCES)], [_plainly(row, DISTANCES) for row in rows])


def calibration(comparisons: Comparisons) -> list[str]:
    """One row per run: whether its confidence means something, and how that differs from the dense model's."""
    rows = calibration_table(comparisons).rows
    return table(["run", "suite", *map(spaced, CALIBRATION)], [_plainly(row, CALIBRATION) for row in rows])


def _plainly(row: Mapping[str, Any], figures: Sequence[str]) -> list[str]:
    return [plain(f"{row['model']} {row['run']}"), plain(row["suite"]), *(_number(row[name]) for name in figures)]


def _number(value: Estimate | float | None) -> str:
    if isinstance(value, Estimate):
        ends = "" if math.isnan(value.low) else f" [{value.low:.3g}, {value.high:.3g}]"
        return f"{value.value:.3g}{ends}"
    return "" if value is None else f"{value:,.0f}" if value.is_integer() else f"{value:.3g}"


def _finding(claim: Claim, finding: Finding) -> list[str]:
    p = "" if claim.margin else f"{finding.p:.2g}"  # "as good as" is decided by the interval alone
    counts = [f"{finding.effect.n:,}", str(finding.seeds), str(len(finding.pairs))]
    return [
        finding.status,
        claim.text,
        plain(finding.model),
        plain(finding.suite),
        claim.measure.words(finding.effect),
        p,
        *counts,
    ]


# Characters that Markdown interprets. An underscore inside a word is plain text in every Markdown dialect.
_MARKS = re.compile(r"[\\`*\[\]~$#|&<>@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.", re.IGNORECASE)


def plain(text: str) -> str:
    """Text from a store as Markdown that shows it literally: no markup, no link, no new line."""
    return _MARKS.sub(lambda mark: f"&#{ord(mark[0])};", "".join(c if c.isprintable() else " " for c in text))


def _code(name: str) -> str:
    return f"`{name}`" if re.fullmatch(r"[\w.-]+", name) else plain(name)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; none where it has no rows."""

    def lines() -> Iterator[str]:
        yield f"| {' | '.join(heads)} |"
        yield f"|{' --- |' * len(heads)}"
        for row in rows:
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"

    found = list(lines())
    return found if len(found) > 2 else []


def percent(estimate: Estimate | None) -> str:
    """A share and its interval in percent; empty where there is none."""
    if estimate is None or math.isnan(estimate.value):
        return ""
    ends = "" if math.isnan(estimate.low) else f" [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    return f"{100 * estimate.value:.1f} %{ends}"


def points(estimate: Estimate) -> str:
    """A difference of shares and its interval, in points; empty where there is none."""
    if math.isnan(estimate.value):
        return ""
    ends = "" if math.isnan(estimate.low) else f" [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"
    return f"{100 * estimate.value:+.1f}{ends}"


def write_below(marker: str, lines: Iterable[str], page: Path) -> None:
    """Replace the part of a page below a marker line; the handwritten part above it stays."""
    by_hand = page.read_text(encoding="utf-8").partition(f"{marker}\n")[0]
    page.write_text("\n".join([f"{by_hand}{marker}", "", *lines, ""]), encoding="utf-8")
