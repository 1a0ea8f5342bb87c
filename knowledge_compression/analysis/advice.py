"""Advice on what to use and what to run next: the smallest setting that keeps enough, and the Pareto front."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scipy.stats import norm

from knowledge_compression.analysis.claims import Claim
from knowledge_compression.analysis.comparisons import Comparisons, Group, is_dense
from knowledge_compression.analysis.findings import ALPHA, UNDECIDED, Finding, Verdict
from knowledge_compression.analysis.measures import ANSWERS
from knowledge_compression.resampling import CONFIDENCE
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import accuracies


@dataclass(frozen=True)
class Kept:
    """How much of the dense model's knowledge a run keeps.

    Attributes:
        run: the run.
        share: of the facts that the dense model answers right, the share that this run answers right.
        at_least: lower bound of that share with 95 % confidence (one-sided; Wilson, or also over seeds if there are
            several).
        size_mb: stored size in 10^6 bytes, with what a recovery trained; None where it is unknown.
        flips: the share of all facts that it answers right and the dense model wrong, or conversely.
        flips_at_most: upper bound of that share with 95 % confidence (one-sided).
    """

    run: Run
    share: float
    at_least: float
    size_mb: float | None
    flips: float
    flips_at_most: float


def kept(group: Group) -> list[Kept]:
    """Every run of a group: the dense one first, the others from largest to smallest, those of unknown size last.

    Returns:
        Empty if the dense model answers nothing right.
    """
    known = group.correct(group.dense)
    if not known.any():
        return []
    rows = []
    for run in group.settings:
        still, flips = accuracies([group.answers(run)[:, known], group.flipped(run)], confidence=2 * CONFIDENCE - 1)
        at_most = 0.0 if is_dense(run) else flips.high
        rows.append(Kept(run, still.value, still.low, run.stored_mb, flips.value, at_most))  # bounds are one-sided
    return sorted(rows, key=lambda row: (not is_dense(row.run), row.size_mb is None, -(row.size_mb or 0)))


def front(rows: Sequence[Kept]) -> list[Kept]:
    """The Pareto front: settings that no other setting beats in both size and knowledge kept, largest first.

    Settings of unknown size are not on it.
    """
    best: list[Kept] = []
    for row in sorted(_sized(rows), key=lambda row: (row.size_mb or 0, -row.share)):
        if not best or row.share > best[-1].share:
            best.append(row)
    return best[::-1]


def enough(row: Kept, keep: float, flips: float = 1.0) -> bool:
    """Whether a setting surely keeps a share of the known facts, and surely flips at most a share of all facts.

    Args:
        row: the setting; the dense model keeps everything.
        keep, flips: the two shares, each to be met with 95 % confidence.
    """
    return is_dense(row.run) or (row.at_least >= keep and row.flips_at_most <= flips)


def smallest(rows: Sequence[Kept], keep: float, flips: float = 1.0) -> Kept | None:
    """The smallest setting of known size that is :func:`enough`, if one is."""
    able = [row for row in _sized(rows) if enough(row, keep, flips)]
    return min(able, key=lambda row: (row.size_mb or 0, -row.at_least), default=None)


def unsized(rows: Sequence[Kept]) -> list[Kept]:
    """The settings of unknown size, those that keep most first."""
    return sorted((row for row in rows if row.size_mb is None), key=lambda row: -row.at_least)


def _sized(rows: Sequence[Kept]) -> list[Kept]:
    return [row for row in rows if row.size_mb is not None]


def run_next(verdicts: Sequence[Verdict], comparisons: Comparisons) -> list[str]:
    """What would decide the undecided claims: the missing runs, or the number of items needed."""
    advice = []
    told = sum(len(verdict.findings) for verdict in verdicts)
    for verdict in verdicts:
        if verdict.status != UNDECIDED:
            continue
        claim = f'{verdict.claim.name}: "{verdict.claim.text}"'
        if not verdict.findings:
            advice += [f"{claim}; no runs here test it; {how}" for how in _commands(verdict.claim, comparisons)]
        for finding in verdict.findings:
            if finding.status == UNDECIDED and (needed := _needed(finding, told)):
                measure = verdict.claim.measure
                advice.append(
                    f"{claim}; {finding.model} on {finding.suite} shows {measure.words(finding.effect)}; "
                    f"about {needed:,} {measure.items} instead of {finding.effect.n:,} would decide it at that size"
                )
    return advice


def _needed(finding: Finding, told: int) -> int | None:
    """How many items would decide an effect of this size among this many findings; None if no number would."""
    effect, claim = finding.effect, finding.claim
    bounds = [-claim.margin, claim.margin] if claim.alike else [-claim.margin]
    away = min(abs(effect.value - bound) for bound in bounds)
    spread = (effect.high - effect.low) / 2
    if not claim.margin:  # decided by a corrected p-value, which has to be small
        spread *= norm.isf(ALPHA / 2 / told) / norm.isf(ALPHA / 2)
    if not away or math.isnan(spread):
        return None
    return max(effect.n + 1, math.ceil(effect.n * (spread / away) ** 2))


# For claims about the size of a recovery: two sizes that the second paper has too.
_TWO_SIZES = {"prompt": " recovery.tokens=26,100", "idp": " 'recovery.prompts=[10,30],[50,100]'"}

# For claims about two kinds of questions: a preset that asks both.
_BOTH_KINDS = "python run.py -m +experiment=facts_or_reasoning/smollm2 data_dir=DIR"


def _commands(claim: Claim, comparisons: Comparisons) -> Iterator[str]:
    """The commands that would make a claim's missing runs, one for the models that were asked the same suites."""
    if claim.kinds:
        yield _BOTH_KINDS
        return
    asked: defaultdict[str, set[str]] = defaultdict(set)
    for group in [*comparisons.groups, *comparisons.measured]:
        if group.dense.taken or group.dense.report["model"].get("family") not in claim.families:
            continue  # runs taken from elsewhere: their model's name means nothing here
        if suite := claim.measure.suite or (group.measure is ANSWERS and group.asked.suite):
            asked[group.asked.model].add("nine_tasks" if claim.tasks and not claim.measure.suite else suite)
    together: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for model, suites in sorted(asked.items()):
        together[tuple(sorted(suites))].append(model)
    for names, models in together.items():
        yield f"python run.py -m model={','.join(models)} eval=[{','.join(names)}]{_settings(claim)}"
    if not together:
        families = " or ".join(family.replace("_", "-") for family in claim.families)
        article = "an" if families[0] in "aeiou" else "a"
        yield f"python run.py -m model=...{_settings(claim)}, with {article} {families} as the model"


def _settings(claim: Claim) -> str:
    def values(key: str, called: str = "") -> str:
        found = [side[key] for side in (claim.better, claim.worse) if side.get(key, "none") != "none"]
        return f" {called or key}={','.join(dict.fromkeys(found))}" if found else ""

    low, high = claim.sparsity or ((0.1, 0.9) if "level" in claim.better else (0.0, 0.0))
    grid = [step / 10 for step in range(1, 10) if low - 1e-9 <= step / 10 <= high + 1e-9]
    sparsity = f" sparsity={','.join(f'{s:g}' for s in grid)}" if grid else ""
    sizes = _TWO_SIZES[claim.better["recovery"]] if claim.better == claim.worse else ""
    before = " recovery=none,lora" if claim.gain_over else ""
    what = values("compression") + values("bits", "compression.bits") + values("target")
    return what + values("recovery") + before + sizes + sparsity
