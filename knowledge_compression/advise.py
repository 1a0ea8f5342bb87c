"""Which setting to use, and what to run next: kc advise outputs/ --keep 95%."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from knowledge_compression.errors import BadInput
from knowledge_compression.progress import underway

_POOLED = ("model", "seed", "eval")  # a table has one model and suite, and pools the seeds of a setting


def main(arguments: list[str] | None = None) -> None:
    """Print advice for each model and suite of a store; bad input is one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="kc advise", description=__doc__)
    parser.add_argument("outputs", type=Path, help="the outputs folder, with runs/ inside")
    parser.add_argument("--keep", default="95%", help="share of the known facts to keep, e.g. 95%% or 0.95 (95%%)")
    parser.add_argument(
        "--flips", help="share of all facts that may flip (right to wrong or back), e.g. 5%%; no limit by default"
    )
    parser.add_argument("--claims", action="store_true", help="also print commands that would test the papers' claims")
    options = parser.parse_args(arguments)
    try:
        flips = 1.0 if options.flips is None else _share("--flips", options.flips, 0.05)
        advise(options.outputs, _share("--keep", options.keep, 0.95), flips, claims=options.claims)
    except BadInput as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def advise(outputs: Path, keep: float, flips: float = 1.0, *, claims: bool = False) -> None:
    """Print, for each model and suite, the Pareto front of size and knowledge and the smallest setting that keeps
    enough.

    Args:
        outputs: folder of the store.
        keep: share of the dense model's known facts to keep, in (0, 1].
        flips: share of all facts whose answers may go from right to wrong or from wrong to right, in (0, 1].
        claims: whether to print the commands of the runs that would test the papers' untested claims.

    Raises:
        BadInput: there is nothing to compare.
    """
    from rich.console import Console
    from rich.table import Table

    from knowledge_compression.analysis.advice import enough, front, kept, run_next, smallest, unsized
    from knowledge_compression.analysis.comparisons import compare, is_dense
    from knowledge_compression.analysis.findings import check
    from knowledge_compression.results.store import RunStore
    from knowledge_compression.results.summary import shown

    with underway("comparing the runs"):
        runs, unreadable = RunStore(outputs).scan()
        comparisons = compare(runs)
    if not comparisons.groups and not comparisons.measured:
        damaged = f" that can be read ({unreadable[0][0]}: {unreadable[0][1]})" if unreadable else ""
        raise BadInput(f"{outputs} holds no dense run to compare with{damaged}; run one with compression=none")
    console, names = Console(), comparisons.names
    wanted = f"{100 * keep:g}%" + (f" and flip at most {100 * flips:g}%" if flips < 1 else "")
    wants = wanted.replace("flip", "flips")

    def say(text: str) -> None:
        console.print(shown(text), soft_wrap=True)

    for group in comparisons:
        rows = kept(group)
        if not rows:
            say(f"{group.asked.model} answers no {group.asked.name} item right, so there is no knowledge to keep.")
            console.print()
            continue
        for title, listed in (("the front", front(rows)), ("of unknown size", unsized(rows))):
            words = shown(f"{group.asked.model}, {group.asked.name}: {title}")
            bounds = "≥, ≤: with 95 % confidence"
            table = Table(title=words, title_justify="left", caption=bounds, caption_justify="left")
            table.add_column("setting", overflow="fold")
            for column in ("MB stored", "facts kept", "flips", "run"):
                table.add_column(column, justify="right", no_wrap=True)
            for row in listed:
                table.add_row(
                    shown(names.of(row.run.id, _POOLED)),
                    "" if row.size_mb is None else f"{row.size_mb:.1f}",
                    f"{row.share:.1%}, ≥ {row.at_least:.1%}",
                    "" if is_dense(row.run) else f"{row.flips:.1%}, ≤ {row.flips_at_most:.1%}",
                    shown(row.run.id[:8]),
                )
            if listed:
                console.print(table)
        best = smallest(rows, keep, flips)
        able = [names.of(row.run.id, _POOLED) for row in unsized(rows) if enough(row, keep, flips)]
        if unsized(rows):
            say(f"Of unknown size, keep {wanted} with 95 % confidence: {', '.join(able) or 'none'}")
        if best:
            kept_by = f"{names.of(best.run.id, _POOLED)} ({best.size_mb:.1f} MB)"
            say(f"Smallest that keeps {wants} with 95 % confidence: {kept_by}")
        console.print()
    verdicts = check(comparisons)
    untested = [verdict for verdict in verdicts if not verdict.findings]
    for line in run_next(verdicts if claims else [v for v in verdicts if v.findings], comparisons):
        say(f"undecided – {line}")
    if untested and not claims:
        say(f"untested – claims of the papers without runs here: {len(untested)}; --claims names the runs they need")
    for run_id, why in [*unreadable, *comparisons.skipped]:
        say(f"left out – {run_id}: {why}")


def _share(option: str, text: str, example: float) -> float:
    try:
        share = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0  # not a share, refused below
    if not 0 < share <= 1:
        raise BadInput(f"{option} {text} is not a share; give e.g. {option} {example:.0%} or {option} {example}")
    return share


if __name__ == "__main__":
    main()
