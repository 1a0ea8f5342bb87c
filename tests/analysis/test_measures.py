"""Claims about values that are neither right nor wrong, on stores built by hand: perplexity, similarity, latency."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import stats

from helpers.stores import bits, made_run
from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.advice import run_next
from knowledge_compression.analysis.claims import CLAIMS
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.findings import CONTRADICTED, SUPPORTED, UNDECIDED, check
from knowledge_compression.analysis.metrics import with_intervals
from knowledge_compression.evaluation.suite import item_table


def valued(suite, values, *, recovery="none", trained=0, compression="gptq", **rest):
    """A run that one suite gave values: rows of ``task, id`` and a value."""
    run = made_run(bits("1"), compression=compression, recovery=recovery)
    rows = [{"suite": suite, **row} for row in values]
    run._items = item_table(rows, {name: pl.Float64() for name in ("nll", "cosine", "seconds") if name in rows[0]})
    run.config["eval"] = run.report["eval"] = {suite: rest.get("told", {})}
    run.config["recovery"], run.report["recovery"] = rest.get("size", {}), {"trainable_parameters": trained}
    run.metrics = {}
    run.environment |= rest.get("environment", {})
    return run


def losses(level, n=40):
    return [{"task": "c4", "id": f"128:{i}", "nll": level + np.sin(i)} for i in range(n)]


def cosines(level, kind, windows=20, layers=6):
    rng = np.random.default_rng(int(1000 * level))
    return [
        {"task": kind, "id": f"model.layers.{layer}#0:{window}", "cosine": level - layer / 50 + rng.normal() / 500}
        for layer in range(layers)
        for window in range(windows)
    ]


def timings(seconds, repeats=5):
    return [
        {"task": task, "id": f"{task}:{i}", "seconds": factor * seconds * (1 + i / 100)}
        for task, factor in (("prefill", 1), ("decode", 0.1))
        for i in range(repeats)
    ]


def verdict_on(name, *runs):
    (claim,) = (claim for claim in CLAIMS if claim.name == name)
    (verdict,) = check(compare(list(runs)), [claim])
    return verdict


@pytest.mark.parametrize(("longer", "expected"), [(2.9, SUPPORTED), (3.1, CONTRADICTED), (3.0, UNDECIDED)])
def test_a_longer_prompt_is_held_against_a_shorter_one_window_by_window(longer, expected):
    dense = valued("perplexity", losses(2.0), compression="none")
    short = valued("perplexity", losses(3.0), recovery="prompt", trained=100, size={"tokens": 26})
    long = valued("perplexity", losses(longer), recovery="prompt", trained=400, size={"tokens": 100})
    verdict = verdict_on("longer_prompts_help_perplexity", dense, short, long)
    (finding,) = verdict.findings
    assert (verdict.status, finding.pairs) == (expected, ((long.id, short.id),))
    assert (finding.effect.value, finding.effect.n) == (pytest.approx(3.0 - longer), 40)
    told = finding.claim.measure.words(finding.effect)
    value, low, high = (100 * np.expm1(-x) for x in (finding.effect.value, finding.effect.high, finding.effect.low))
    assert value == pytest.approx(100 * np.expm1(longer - 3.0)) and low <= value <= high
    assert told == f"{value:+.1f} [{low:+.1f}, {high:+.1f}] % perplexity"  # more of it where the longer prompt is worse


def test_layers_of_one_window_are_one_piece_of_evidence():
    def run(attention, activation, **settings):
        return valued("similarity", cosines(attention, "attention") + cosines(activation, "activation"), **settings)

    dense = run(1.0, 1.0, compression="none")
    lora = run(0.95, 0.90, recovery="lora", trained=900)
    idp = run(0.80, 0.901, recovery="idp", trained=100)
    attention = verdict_on("idp_turns_attention", dense, lora, idp)
    assert (attention.status, attention.findings[0].effect.n) == (SUPPORTED, 20)
    assert attention.findings[0].effect.value == pytest.approx(0.15, abs=0.002)
    assert verdict_on("idp_keeps_activations", dense, lora, idp).status == SUPPORTED
    far = run(0.80, 0.80, recovery="idp", trained=100)
    assert verdict_on("idp_keeps_activations", dense, lora, far).status == CONTRADICTED


def test_timings_are_two_samples():
    dense = valued("latency", timings(0.3), compression="none")
    lora = valued("latency", timings(0.62), recovery="lora", trained=900)
    idp = valued("latency", timings(0.37), recovery="idp", trained=100)
    verdict = verdict_on("idp_is_faster_than_lora", dense, lora, idp)
    (finding,) = verdict.findings
    expected = stats.ttest_ind(
        *(-np.log([r["seconds"] for r in timings(s)[:5]]) for s in (0.37, 0.62)), equal_var=False
    )
    assert verdict.status == SUPPORTED
    assert finding.effect.value == pytest.approx(np.log(0.62 / 0.37)) and finding.effect.n == 5
    assert finding.effect.p == pytest.approx(expected.pvalue)
    assert (finding.effect.low, finding.effect.high) == pytest.approx(expected.confidence_interval(0.95))
    assert "+67.6 [" in finding.claim.measure.words(finding.effect)  # the published 0.37 s against 0.62 s
    (row,) = (line for line in markdown.findings([verdict]) if "IDP reads a batch faster" in line)
    assert "+67.6 [" in row and "% speed" in row
    slow = valued("latency", timings(0.62), recovery="idp", trained=100)
    undecided = verdict_on("idp_is_faster_than_lora", dense, lora, slow)
    assert undecided.status == UNDECIDED


def test_times_of_two_machines_are_not_compared():
    told = {"device": "cpu", "threads": 1}
    here, there = ({"host": host} for host in ("here", "there"))
    runs = [valued("latency", timings(0.3), compression="none", told=told, environment=here)]
    runs.append(valued("latency", timings(0.6), recovery="lora", trained=900, told=told, environment=here))
    runs.append(valued("latency", timings(0.3), recovery="idp", trained=100, told=told, environment=there))
    assert verdict_on("idp_is_faster_than_lora", *runs).findings == ()
    ((run, why),) = compare(runs).skipped
    assert run == runs[2].id and "machine=there" in why


def test_a_run_that_lacks_windows_is_left_out_by_name():
    runs = [valued("perplexity", losses(2.0), compression="none"), valued("perplexity", losses(2.0, n=30))]
    comparisons = compare(runs)
    assert comparisons.groups == [] and comparisons.measured[0].runs == []
    assert comparisons.skipped == [(runs[1].id, "10 items that its baseline answers are missing")]


def test_what_is_missing_is_asked_of_the_suite_that_measures_it():
    dense = valued("latency", timings(0.3), compression="none")
    advice = dict(line.split(": ", 1) for line in run_next(check(compare([dense])), compare([dense])))
    assert "model=m eval=[latency] recovery=idp,lora" in advice["idp_is_faster_than_lora"]
    assert "eval=[perplexity] recovery=prompt recovery.tokens=26,100" in advice["longer_prompts_help_perplexity"]


def test_the_page_of_a_run_has_an_interval_of_its_similarity():
    run = valued("similarity", cosines(0.9, "attention"))
    run.metrics = {"similarity.attention": 0.85, "similarity.attention.0": 0.9}
    told = with_intervals([run])[run.id]
    value, estimate = told["similarity.attention"]
    assert value == 0.85 and estimate.n == 20 and 0.84 < estimate.low < estimate.high < 0.86
    assert "similarity.attention.0" not in told


def test_the_page_of_a_run_has_an_interval_of_its_timings():
    run = valued("latency", timings(0.3))
    seconds = run.items.filter(pl.col("task") == "prefill")["seconds"]
    run.metrics = {"latency.prefill_seconds": seconds.median(), "latency.prefill_seconds_min": seconds.min()}
    told = with_intervals([run])[run.id]
    value, estimate = told["latency.prefill_seconds"]
    assert value == estimate.value and estimate.n == len(seconds)
    assert seconds.min() <= estimate.low < value < estimate.high <= seconds.max()
    assert told["latency.prefill_seconds_min"][1] is None
