"""Each claim of the papers checked on a store of runs: supported, contradicted or undecided, with the evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from knowledge_compression.analysis.claims import CLAIMS, Claim
from knowledge_compression.analysis.comparisons import Comparisons, Group, seedless
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, corrected, mean_difference

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"
ALPHA = 0.05


@dataclass(frozen=True)
class Finding:
    """A claim held against one model and suite.

    Attributes:
        claim: what was claimed.
        model, suite: where it was checked.
        status: ``supported``, ``contradicted`` or ``undecided``.
        effect: accuracy kept by the supposedly better setting minus the other's, averaged over the pairs, by item.
        p: of the effect, after Holm's correction over all findings of the store.
        pairs: the run ids compared, better first; of several seeds, those with the least.
        seeds: how many seeds the effect is averaged over, those that all its runs share.
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
    """A claim over all models: supported where some model supports it and none contradicts it, and the reverse."""

    claim: Claim
    status: str
    findings: tuple[Finding, ...]


def check(comparisons: Comparisons, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """Hold every claim against everything in the store that can be compared.

    Returns:
        One verdict a claim, in the claims' order; a claim with no pair of runs to rest on is undecided with no finding.
    """
    drafts = [finding for claim in claims for group in comparisons for finding in _find(claim, group)]
    p_values = corrected([finding.effect.p or 0.0 for finding in drafts])
    findings = [_decided(finding, p) for finding, p in zip(drafts, p_values, strict=True)]
    return [_verdict(claim, [finding for finding in findings if finding.claim is claim]) for claim in claims]


def _find(claim: Claim, group: Group) -> Iterable[Finding]:
    if claim.suites and group.asked.suite not in claim.suites:
        return
    if group.dense.report["model"].get("family") not in claim.families:
        return
    everything = [group.dense, *group.runs]
    better = [run for run in everything if _fits(run, claim.better, claim.sparsity)]
    worse = [run for run in everything if _fits(run, claim.worse, claim.sparsity)]
    pairs = [(b, w) for b in better for w in worse if _alike(b, w, claim)]
    if not pairs:
        return
    asked_for = np.ones(group.items.height, bool)
    if claim.tasks:
        asked_for = group.items["task"].is_in(list(claim.tasks)).to_numpy()
        if not asked_for.any():
            return
    seeds = _common_seeds(group, {run.id: run for pair in pairs for run in pair}.values())
    by_seed = [[group.under(b, s).astype(float) - group.under(w, s) for b, w in pairs] for s in seeds]
    effect = mean_difference(np.mean(by_seed, axis=1)[:, asked_for])
    ids = tuple((b.id, w.id) for b, w in pairs)
    yield Finding(claim, group.asked.model, group.asked.name, UNDECIDED, effect, 1.0, ids, len(seeds))


def _common_seeds(group: Group, runs: Iterable[Run]) -> list[int]:
    """The seeds that all settings were run with; where there are none, one, under which each gives its first."""
    sets = [set(group.seeds_of(run)) for run in runs if run is not group.dense]
    return sorted(set.intersection(*sets)) or [min(map(min, sets))]


def _fits(run: Run, wanted: Mapping[str, str], sparsity: tuple[float, float] | None) -> bool:
    choices = run.config["choices"]
    for key, value in wanted.items():
        if key == "level":
            if (run.config["sparsity"] <= 0.5) != (value == "up to 0.5"):
                return False
        elif choices.get(key) != value:
            return False
    if sparsity is None or choices["compression"] == "none":
        return True
    return sparsity[0] - 1e-9 <= run.config["sparsity"] <= sparsity[1] + 1e-9


# What two runs of a pair must share, unless the claim is about it.
_SHARED = ("compression", "settings", "target", "recovery", "corpus", "sparsity", "reading")


def _alike(better: Run, worse: Run, claim: Claim) -> bool:
    """Whether two runs differ in nothing but what the claim is about, and what follows from that."""
    differs = {key for key in {*claim.better, *claim.worse} if claim.better.get(key) != claim.worse.get(key)}
    if "level" in differs:
        differs.add("sparsity")
    if "compression" in differs:
        differs.add("settings")
        if not (_prunes(better) and _prunes(worse)):
            differs.add("sparsity")
        if "none" in (_setting(better, "compression"), _setting(worse, "compression")):
            differs.add("target")
    return all(_setting(better, key) == _setting(worse, key) for key in _SHARED if key not in differs)


def _setting(run: Run, key: str) -> Any:
    if key in ("sparsity", "reading"):
        return run.config[key]
    if key == "settings":  # of the compression, such as bits; without sparsity, which is compared by itself
        return seedless({k: v for k, v in run.config["compression"].items() if k not in ("sparsity", "steps")})
    if key == "corpus" and not run.report["compression"].get("calibration"):
        return None  # no text decided what was compressed
    return run.config["choices"].get(key)


def _prunes(run: Run) -> bool:
    return bool(run.report["compression"].get("sparsity"))


def _decided(finding: Finding, p: float) -> Finding:
    effect, margin = finding.effect, finding.claim.margin
    status = UNDECIDED
    if margin:  # "as good as": the whole interval lies above, or below, the margin
        status = SUPPORTED if effect.low > -margin else CONTRADICTED if effect.high < -margin else UNDECIDED
    elif p < ALPHA and effect.value:
        status = SUPPORTED if effect.value > 0 else CONTRADICTED
    return replace(finding, status=status, p=p)


def _verdict(claim: Claim, findings: Sequence[Finding]) -> Verdict:
    said = {finding.status for finding in findings} - {UNDECIDED}
    return Verdict(claim, said.pop() if len(said) == 1 else UNDECIDED, tuple(findings))
