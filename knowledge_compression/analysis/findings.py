"""Each claim of the papers, checked on a store of runs: supported, contradicted or undecided, with the evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knowledge_compression.analysis import kinds
from knowledge_compression.analysis.claims import CLAIMS, EVERYTHING, Claim, Kind
from knowledge_compression.analysis.comparisons import Comparisons, Group, seedless
from knowledge_compression.analysis.naming import recovery_size
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, corrected, difference_of_means, mean_differences

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
MAJORITY = "majority"  # in a pair: always giving a task's most frequent answer
ALPHA = 0.05
_UNKNOWN = Estimate(np.nan, np.nan, np.nan, 0)


@dataclass(frozen=True)
class Finding:
    """A claim checked for one model and suite.

    Attributes:
        claim: the claim.
        model, suite: where it was checked.
        status: ``supported``, ``contradicted`` or ``undecided``.
        effect: gain (:class:`~.measures.Measure`; accuracy for answers) under the supposedly better setting minus that
        under the other, by item, averaged over the pairs. For a claim about kinds of questions: the share kept of
        the first kind minus that of the second (:mod:`~.kinds`), averaged over the runs.
        p: p-value of the effect, after Holm's correction over all findings of the store.
        pairs: the run ids compared, better first (or :data:`MAJORITY`), or each run and its baseline; with several
        seeds, those of the lowest.
        seeds: number of seeds over which the effect is averaged, those shared by all its runs.
    """

    claim: Claim
    model: str
    suite: str
    status: str
    effect: Estimate
    p: float
    pairs: tuple[tuple[str, str], ...]
    seeds: int = 1


@dataclass(frozen=True)
class Verdict:
    """A claim over all models: supported if some model supports it and none contradicts it, and conversely."""

    claim: Claim
    status: str
    findings: tuple[Finding, ...]


def check(comparisons: Comparisons, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """Check every claim against everything in the store that can be compared.

    Returns:
        One verdict per claim, in order; a claim without a pair of runs is undecided and has no finding.
    """
    groups = [*comparisons.groups, *comparisons.measured]
    drafts = [draft for claim in claims if not claim.kinds for group in groups for draft in _find(claim, group)]
    found = [replace(draft, effect=effect) for (draft, *_), effect in zip(drafts, _effects(drafts), strict=True)]
    found += [finding for claim in claims if claim.kinds for finding in _of_kinds(claim, claim.kinds, comparisons)]
    p_values = corrected([finding.effect.p or 0.0 for finding in found])
    findings = [_decided(finding, p) for finding, p in zip(found, p_values, strict=True)]
    return [_verdict(claim, [finding for finding in findings if finding.claim is claim]) for claim in claims]


Draft = tuple[Finding, NDArray[np.float64], NDArray[np.float64]]


def _effects(drafts: Sequence[Draft]) -> list[Estimate]:
    """Estimates of paired differences if the items are the same, otherwise of the difference of two means."""
    paired = [better - worse for finding, better, worse in drafts if finding.claim.measure.paired]
    differences = iter(mean_differences(paired))
    return [
        next(differences) if finding.claim.measure.paired else difference_of_means(better.ravel(), worse.ravel())
        for finding, better, worse in drafts
    ]


def _find(claim: Claim, group: Group) -> Iterable[Draft]:
    """A finding without its effect, and both sides' gains averaged over pairs: ``[seeds, items]``."""
    if claim.measure.column != group.measure.column or (claim.suites and group.asked.suite not in claim.suites):
        return
    if group.dense.report["model"].get("family") not in claim.families:
        return
    pairs = _pairs(claim, group)
    if not pairs:
        return
    asked_for = np.ones(group.items.height, bool)
    if claim.tasks:
        asked_for = group.items["task"].is_in(list(claim.tasks)).to_numpy()
        if not asked_for.any():
            return
    seeds = _common_seeds(group, {run.id: run for pair in pairs for run in pair if run}.values())
    sides = [[[_gains(claim, group, run, seed) for run in side] for seed in seeds] for side in zip(*pairs, strict=True)]
    better, worse = (np.mean(side, axis=1)[:, asked_for] for side in sides)
    ids = tuple((b.id if b else MAJORITY, w.id) for b, w in pairs)
    draft = Finding(claim, group.asked.model, group.asked.name, UNDECIDED, _UNKNOWN, 1.0, ids, len(seeds))
    yield draft, better, worse


def _of_kinds(claim: Claim, of: tuple[Kind, Kind], comparisons: Comparisons) -> Iterable[Finding]:
    """The findings of a claim about two kinds of questions, one for every two suites that ask them in the same runs."""
    drafts, tables = [], []
    for one, other, both in kinds.pairs(comparisons.groups, of):
        runs = [run for run in both if _fits(run, claim.worse, claim.sparsity)]
        if not runs or one.group.dense.report["model"].get("family") not in claim.families:
            continue
        seeds = _common_seeds(one.group, runs)
        tables.append((one.table(runs, seeds), other.table(runs, seeds)))
        ids = tuple((run.id, one.group.dense.id) for run in runs)
        names = f"{one.name} against {other.name}"
        drafts.append(Finding(claim, one.group.asked.model, names, UNDECIDED, _UNKNOWN, 1.0, ids, len(seeds)))
    return [replace(draft, effect=effect) for draft, effect in zip(drafts, kinds.differences(tables), strict=True)]


def _pairs(claim: Claim, group: Group) -> list[tuple[Run | None, Run]]:
    """The runs to compare, the supposedly better one first; None means always giving the most frequent answer."""
    everything = group.settings
    worse = [run for run in everything if _fits(run, claim.worse, claim.sparsity)]
    if claim.better == {"answers": MAJORITY}:
        return [
            (None, run) for run in worse if run.config["choices"]["recovery"] == "none" and group.majority is not None
        ]
    better = [run for run in everything if _fits(run, claim.better, claim.sparsity)]
    pairs = [(b, w) for b in better for w in worse if b is not w and _alike(b, w, claim)]
    if claim.gain_over:
        pairs = [pair for pair in pairs if all(_before(run, claim.gain_over, group) not in (None, run) for run in pair)]
    return list(pairs)


def _gains(claim: Claim, group: Group, run: Run | None, seed: int) -> NDArray[np.float64]:
    """The value of one side of a pair, absolute or relative to its reference run: ``[items]``."""
    if run is None:
        assert group.majority is not None
        return group.majority.astype(float)
    if claim.measure.against_dense:
        return claim.measure.gain((group.correct(group.under(run, seed)) != group.correct(group.dense)).astype(float))
    gains = group.gains(group.under(run, seed))
    if claim.gain_over and (before := _before(run, claim.gain_over, group)):
        gains = gains - group.gains(group.under(before, seed))
    return gains


def _before(run: Run, wanted: Mapping[str, str], group: Group) -> Run | None:
    """The run that has the wanted settings and otherwise equals ``run``."""
    shared = [key for key in _SHARED if key not in (*wanted, "size")]
    for other in group.runs:
        if _fits(other, wanted, None) and all(_setting(other, key) == _setting(run, key) for key in shared):
            return other
    return None


def _common_seeds(group: Group, runs: Iterable[Run]) -> list[int]:
    """The seeds shared by all settings; if there are none, one for which each setting's first run is used."""
    each = [{seed for seed in group.seeds_of(run) if seed is not None} for run in runs if run is not group.dense]
    drawn = [seeds for seeds in each if seeds]
    if not drawn:  # no setting depends on the seed
        return [0]
    return sorted(set.intersection(*drawn)) or [min(map(min, drawn))]


def _fits(run: Run, wanted: Mapping[str, str], sparsity: tuple[float, float] | None) -> bool:
    choices = run.config["choices"]
    for key, value in wanted.items():
        if key == "level":
            if run.config["sparsity"] is None or (run.config["sparsity"] <= 0.5) != (value == "up to 0.5"):
                return False
        elif key == "bits":
            bits = run.config["compression"].get("bits")
            if bits is None or f"{bits:g}" != value:
                return False
        elif choices.get(key) not in (EVERYTHING if (key, value) == ("target", "all") else (value,)):
            return False
    if sparsity is None or not _prunes(run):
        return True
    return sparsity[0] - 1e-9 <= run.config["sparsity"] <= sparsity[1] + 1e-9


# What two runs of a pair must share, unless the claim is about it.
_SHARED = ("compression", "settings", "target", "recovery", "size", "corpus", "sparsity", "reading")


def _alike(better: Run, worse: Run, claim: Claim) -> bool:
    """Whether two runs differ only in what the claim is about and its consequences."""
    differs = {key for key in {*claim.better, *claim.worse} if claim.better.get(key) != claim.worse.get(key)}
    if "level" in differs:
        differs.add("sparsity")
    if "bits" in differs:
        differs.add("settings")
    if "recovery" in differs or claim.parameters is not None:
        differs.add("size")
    if claim.parameters is not None:
        least, most = (share * _trained(worse) for share in claim.parameters)
        if not (_trained(better) and _trained(worse) and least <= _trained(better) <= most):
            return False
    if "compression" in differs:
        differs.add("settings")
        if not (_prunes(better) and _prunes(worse)):
            differs.add("sparsity")
        if "none" in (_setting(better, "compression"), _setting(worse, "compression")):
            differs |= {"target", "corpus"}
    return all(_setting(better, key) == _setting(worse, key) for key in _SHARED if key not in differs)


def _setting(run: Run, key: str) -> Any:
    if key in ("sparsity", "reading"):
        return run.config[key]
    if key == "size":
        return recovery_size(run)
    if key == "settings":  # of the compression, such as bits; without sparsity, which is compared separately
        return seedless({k: v for k, v in run.config["compression"].items() if k not in ("sparsity", "steps")})
    if key == "corpus" and not run.report["compression"].get("calibration"):
        return None  # no text decided what was compressed
    return run.config["choices"].get(key)


def _trained(run: Run) -> int:
    return run.report.get("recovery", {}).get("trainable_parameters") or 0


def _prunes(run: Run) -> bool:
    return bool(run.report["compression"].get("sparsity"))


def _decided(finding: Finding, p: float) -> Finding:
    effect, margin = finding.effect, finding.claim.margin
    status = UNDECIDED
    if margin:  # "as good as", "alike": the whole interval lies within the margin, or beyond it
        most = margin if finding.claim.alike else np.inf
        if effect.low > -margin and effect.high < most:
            status = SUPPORTED
        elif effect.high < -margin or effect.low > most:
            status = CONTRADICTED
    elif p < ALPHA and effect.value:
        status = SUPPORTED if effect.value > 0 else CONTRADICTED
    return replace(finding, status=status, p=p)


def _verdict(claim: Claim, findings: Sequence[Finding]) -> Verdict:
    said = {finding.status for finding in findings} - {UNDECIDED}
    return Verdict(claim, said.pop() if len(said) == 1 else UNDECIDED, tuple(findings))
