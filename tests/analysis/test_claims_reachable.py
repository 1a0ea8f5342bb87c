"""Every claim that a paper makes has runs to rest on among those that its presets ask for."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from helpers.stores import made_run
from knowledge_compression.analysis.claims import CLAIMS, FIRST, SECOND, WORLD
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.findings import check
from knowledge_compression.sweeping.cli import CONF
from knowledge_compression.sweeping.combinations import combinations

TASKS = {
    "lama": ["TREx.P19", "Google_RE.place_of_birth"],
    "harness": ["boolq", "piqa", "winogrande"],
    "nine_tasks": [*WORLD, "piqa", "hellaswag", "lambada_openai", "winogrande"],
}
MEASURED = {
    "perplexity": [{"task": "c4", "nll": 3.0}],
    "similarity": [{"task": kind, "cosine": 0.9} for kind in ("attention", "activation")],
    "latency": [{"task": "prefill", "seconds": 0.1}],
}
PRESETS = {FIRST: "cost_of_compression", SECOND: "forgotten_or_displaced"}
UNREACHABLE: dict[str, str] = {}  # claim: the reason why no preset bears on it


def asked_by(path) -> list[tuple[dict[str, str], list[str]]]:
    """The settings and suites of every run that a preset asks for, of its first model."""
    preset = yaml.safe_load(path.read_text())
    suites = next(one["override /eval"] for one in preset["defaults"] if "override /eval" in one)
    of_defaults = {key.split("/")[1]: one[key] for one in preset["defaults"] for key in one if "eval" not in key}
    sweeper = preset["hydra"]["sweeper"]
    runs = []
    for grid in sweeper.get("grids") or [{}]:
        swept = {key: str(value).lower() for key, value in (sweeper.get("params", {}) | grid).items()}
        swept["model"] = swept["model"].split(",")[0]
        parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in swept.items()])
        for job in combinations(parsed):
            runs.append((of_defaults | dict(one.split("=", 1) for one in job), suites))
    return runs


def family_of(model: str) -> str:
    if "t5" in model:
        return "encoder_decoder"
    return "decoder" if model in ("vicuna", "llama_7b") else "encoder"


def carried_out(settings, suites, *, dense=False):
    """A run of these settings whose answers are made up."""
    compression = "none" if dense else settings["compression"]
    recovery = "none" if dense else settings.get("recovery", "none")
    sparsity = float(settings.get("sparsity", 0.2))
    tasks = [(suite, task) for suite in suites for task in TASKS.get(suite, [])] * 4
    family = family_of(settings["model"])
    run = made_run(
        [True] * max(1, len(tasks)), compression=compression, sparsity=sparsity, recovery=recovery, family=family
    )
    run.config["choices"] |= {
        "model": settings["model"],
        "target": settings["target"],
        "corpus": settings.get("corpus", ""),
    }
    parts = {part: {} for part in ("compression", "recovery")}
    for key, value in settings.items():
        part, _, name = key.partition(".")
        if name:
            parts[part][name] = yaml.safe_load(value)
    run.config["compression"] |= {} if dense else parts["compression"]
    run.config["recovery"] = {} if dense else parts["recovery"]
    sizes = parts["recovery"]
    tokens = np.sum(sizes.get("tokens", sizes.get("prompts", 50)))  # of LLaMA's 4096 numbers, as the paper counts
    size = sizes["rank"] * 2_200_000 if "rank" in sizes else int(tokens) * 4096
    run.report["recovery"] = {"strategy": recovery, "trainable_parameters": size if recovery != "none" else 0}
    if settings.get("corpus") and not dense:
        run.report["compression"] = run.report["compression"] | {"calibration": settings["corpus"]}
    run.config["eval"] = {suite: {} for suite in suites}
    run.report["eval"] = {suite: {"fingerprint": "f"} for suite in suites}
    answered = run.items.with_columns(
        suite=pl.Series([suite for suite, _ in tasks] or ["none"]),
        task=pl.Series([task for _, task in tasks] or ["none"]),
    )
    measured = [
        row | {"suite": suite, "id": f"0:{i}"} for suite in suites for row in MEASURED.get(suite, []) for i in range(4)
    ]
    run._items = pl.concat([answered, pl.DataFrame(measured)], how="diagonal") if measured else answered
    return run


@pytest.mark.parametrize("paper", PRESETS)
def test_every_claim_is_reachable_from_the_papers_presets(paper):
    folder = CONF / "experiment" / PRESETS[paper]
    wanted = [
        one
        for path in sorted(folder.glob("*.yaml"))
        if not path.stem.startswith(("small", "best", "older"))
        for one in asked_by(path)
    ]
    dense = {(settings["model"], *suites): carried_out(settings, suites, dense=True) for settings, suites in wanted}
    runs = [*dense.values(), *(carried_out(settings, suites) for settings, suites in wanted)]
    claims = [claim for claim in CLAIMS if claim.source.startswith(paper)]
    assert len(claims) > 10
    out_of_reach = {verdict.claim.name for verdict in check(compare(runs), claims) if not verdict.findings}
    assert out_of_reach == {claim.name for claim in claims if claim.name in UNREACHABLE}
