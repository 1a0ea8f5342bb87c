"""One self-contained HTML page over a store of runs: overview, charts, findings, a fact explorer, and every run."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from jinja2 import Environment, PackageLoader

from knowledge_compression import __version__
from knowledge_compression.analysis.calibration import calibrated
from knowledge_compression.analysis.comparisons import KEY, Comparisons, Group, compare, is_dense, items_of
from knowledge_compression.analysis.fates import (
    FATES,
    RESTORED,
    shares_by_depth,
    shares_by_setting,
    shares_of_fates,
    shares_restored,
)
from knowledge_compression.analysis.findings import Verdict, check
from knowledge_compression.analysis.ledger import looked_into
from knowledge_compression.analysis.markdown import by_fact, displaced, facts_and_reasoning
from knowledge_compression.analysis.metrics import with_intervals
from knowledge_compression.analysis.naming import reading_order
from knowledge_compression.analysis.tables import CALIBRATION
from knowledge_compression.errors import first_line
from knowledge_compression.results.shape import finite
from knowledge_compression.results.store import Run
from knowledge_compression.results.varying import Names
from knowledge_compression.statistics import Estimate

log = logging.getLogger(__name__)

_SHOWN = ("prediction", "correct", "log_prob", "rank")  # of an answer, in the fact explorer
_OF_ANSWER, _KL = "prediction_log_prob", "kl"  # which not all runs have
LARGEST = 24_000_000  # bytes of a page; above this the fact explorer holds fewer facts, and says so


def render(runs: Sequence[Run], skipped: Sequence[tuple[str, str]] = ()) -> str:
    """The page as one string of HTML that needs no network.

    Args:
        runs: finished runs.
        skipped: folders that could not be read, and why; named on the page.
    """
    from plotly.offline import get_plotlyjs

    runs = sorted(runs, key=reading_order)
    comparisons = compare(runs)
    names = comparisons.names
    verdicts = check(comparisons)
    metrics = with_intervals(runs)
    # Every value is escaped, whatever the template's file name; the scripts are ours and identified by their hashes.
    templates = Environment(loader=PackageLoader("knowledge_compression.analysis", "templates"), autoescape=True)
    scripts = [get_plotlyjs(), templates.get_template("report.js").render()]
    around = partial(
        templates.get_template("report.html.j2").render,
        scripts=scripts,
        allowed=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
        verdicts=[_verdict(verdict) for verdict in verdicts],
        labels={run.id: names.of(run.id) for run in runs},
        silent=[verdict.claim for verdict in verdicts if not verdict.findings],
        wordings=[found for found in (by_fact(comparisons), displaced(comparisons)) if found.rows],
        kinds=facts_and_reasoning(comparisons),
        skipped=[*skipped, *comparisons.skipped],
        counts=_counts(runs, comparisons, verdicts, len(skipped)),
        version=__version__,
    )
    content = _packed(
        {
            "runs": [_run(run, metrics[run.id], names) for run in runs],
            "varying": [one.name for one in names.settings if not one.chosen and one.name != "seed"],
            "points": [point for group in comparisons for point in _points(group)],
            "measured": [point for group in comparisons.measured for point in _measured(group)],
            "fates": [_fates(group) for group in comparisons],
            "sure": [row for group in comparisons for row in _sure(group)],
            "names": {"fates": FATES, "restored": RESTORED},
        }
    )
    room = LARGEST - len(around(content=content))
    every = 1
    while len(facts := _packed([_facts(group, every) for group in comparisons])) > room and every < 1000:
        every = max(every + 1, math.ceil(every * len(facts) / room)) if room > 0 else 1000
    return around(content=content, facts=facts)


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _packed(content: Any) -> str:
    """JSON as gzip in base64, which a browser unpacks."""
    return base64.b64encode(gzip.compress(json.dumps(finite(content)).encode(), mtime=0)).decode()


def _counts(runs: Sequence[Run], comparisons: Comparisons, verdicts: Sequence[Verdict], skipped: int) -> dict[str, int]:
    """How many of each thing there are, by its name in the singular or plural."""
    found = {
        ("run", "runs"): len(runs),
        ("dense baseline", "dense baselines"): sum(is_dense(run) for run in runs),
        ("model", "models"): len({run.config["choices"]["model"] for run in runs}),
        ("answer", "answers"): sum(group.items.height * len(group.members) for group in comparisons),
        ("finding decided", "findings decided"): sum(verdict.status != "undecided" for verdict in verdicts),
    } | ({("folder left out", "folders left out"): skipped} if skipped else {})
    return {one if count == 1 else several: count for (one, several), count in found.items()}


def _run(run: Run, metrics: Mapping[str, tuple[float, Estimate | None]], names: Names) -> dict[str, Any]:
    """What the page shows about a single run."""
    compression = run.report.get("compression", {})
    return {
        "id": run.id,
        "label": names.of(run.id),
        "setting": names.of(run.id, ("seed", "eval")),  # pooled over seeds, of one suite
        "method": names.of(run.id, ("model", "target", "seed", "eval")),
        "told": names.values(run.id),
        "dense": is_dense(run),
        **{key: run.config["choices"].get(key, "") for key in ("model", "target", "compression", "recovery")},
        "sparsity": compression.get("sparsity", None if run.taken else 0.0),
        "bits": compression.get("bits") or None,
        "stored_mb": run.stored_mb,
        "seed": run.config["seed"],
        "metrics": {name: [value, *(_told(e)[1:] if e else ())] for name, (value, e) in metrics.items()},
        "note": run.report["model"].get("note", ""),
        "void": run.void,
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "environment": run.environment,
        "layers": _layers(run),
    }


def _layers(run: Run) -> list[dict[str, Any]]:
    """The data of the layer map; empty if the store's file of layers is invalid."""
    try:
        layers = run.layers
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s: layers left out (%s)", run.id, first_line(error))
        return []
    return [{key: layer.get(key) for key in ("path", "parameters", "removed")} for layer in layers]


def _points(group: Group) -> list[dict[str, Any]]:
    """Accuracy and drop of each setting of a group, pooled over its seeds, with their intervals."""
    majority = group.dense.metrics.get(f"{group.asked.suite}.majority")
    points = []
    for run in group.settings:
        points.append(
            {"run": run.id, "suite": group.asked.name, "of": group.asked.suite, "seeds": len(group.seeds_of(run))}
            | {"majority": majority}
            | {"accuracy": _interval(group.accuracies[run.id])}
            | {"drop": _interval(group.drops[run.id]) if run is not group.dense else None}
            | {"flips": _interval(group.flips[run.id]) if run is not group.dense else None}
        )
    return points


def _measured(group: Group) -> list[dict[str, Any]]:
    """The settings of a group without right answers, each with the name of the metric that is shown first."""
    metric = f"{group.asked.suite}.{group.measure.metric}"
    return [
        {"run": run.id, "suite": group.asked.name, "of": group.asked.suite, "metric": metric}
        | {"seeds": len(group.seeds_of(run))}
        for run in group.settings
    ]


def _sure(group: Group) -> list[dict[str, Any]]:
    """Calibration of each setting of a group, if its answers are ranked among a list."""
    return [
        {"run": one.run.id, "suite": group.asked.name, "answers": one.answers}
        | {name: _interval(getattr(one, name)) for name in CALIBRATION}
        for one in calibrated(group)
    ]


def _interval(estimate: Estimate | None) -> list[float] | None:
    return [estimate.value, estimate.low, estimate.high] if estimate else None


def _fates(group: Group) -> dict[str, Any]:
    """The fates of the facts under each run, what restored them, and the depth at which they were lost."""

    def told(row: dict[str, Any]) -> dict[str, Any]:
        return {key: _told(value) for key, value in row.items()}

    runs = [run for run in group.members if not is_dense(run)]
    restored = shares_restored(group)
    by_depth = {run.id: shares_by_depth(group, run) for run in runs}
    return {
        "model": group.asked.model,
        "suite": group.asked.name,
        "runs": {run.id: [told(row) for row in shares_of_fates(group, run)] for run in runs},
        "settings": [told(row) for row in shares_by_setting(group, restored)],
        "restored": [told(row) for row in restored],
        "depths": {run: told(found) for run, found in by_depth.items() if found},
    }


def _told(value: Any) -> Any:
    """Estimates, wherever they stand, as value, low and high."""
    if isinstance(value, Estimate):
        return _interval(value)
    if isinstance(value, dict):
        return {key: _told(part) for key, part in value.items()}
    return [_told(part) for part in value] if isinstance(value, list) else value


def _facts(group: Group, every: int) -> dict[str, Any]:
    """Every item of a group, or every n-th, with each run's answer, as indices into one list of strings."""
    items = items_of(group.dense, group.asked.suite).select(*KEY, "prompt", "gold").collect().gather_every(every)
    strings: dict[str, int] = {}
    answers = {}
    for run in group.members:
        theirs = items.select(KEY).join(
            items_of(run, group.asked.suite).select(*KEY, *_SHOWN, pl.col(f"^({_OF_ANSWER}|{_KL})$")).collect(),
            on=KEY,
            how="left",
            maintain_order="left",
        )
        answers[run.id] = {
            "said": [strings.setdefault(text or "", len(strings)) for text in theirs["prediction"]],
            "right": [int(bool(right)) for right in theirs["correct"]],
            "gold": _rounded(theirs["log_prob"]),
            "sure": _rounded(theirs[_OF_ANSWER]) if _OF_ANSWER in theirs.columns else None,
            "kl": _rounded(theirs[_KL].list.mean(), 3) if _KL in theirs.columns else None,
            "rank": theirs["rank"].to_list(),
            "depths": _ranks_by_depth(run, group.asked.suite, items),
        }
    return {
        "suite": group.asked.name,
        "model": group.asked.model,
        "dense": group.dense.id,
        "of": group.items.height,
        "task": items["task"].to_list(),
        "question": items["prompt"].to_list(),
        "answer": items["gold"].to_list(),
        "runs": answers,
        "strings": list(strings),
    }


def _rounded(values: pl.Series, digits: int = 2) -> list[float | None]:
    return [None if value is None else round(value, digits) for value in values]


def _ranks_by_depth(run: Run, suite: str, items: pl.DataFrame) -> list[list[int] | None] | None:
    """The right answer's rank by depth for each item, if the lens was applied to the suite."""
    if not looked_into(run, suite):
        return None
    seen = run.scan_items().filter(pl.col("suite") == "lens").select(*KEY, "depth_rank").collect()
    return items.select(KEY).join(seen, on=KEY, how="left", maintain_order="left")["depth_rank"].to_list()


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "name": verdict.claim.name,
        "text": verdict.claim.text,
        "source": verdict.claim.source,
        "status": verdict.status,
        "findings": [
            {
                "model": f.model,
                "suite": f.suite,
                "status": f.status,
                "effect": verdict.claim.measure.words(f.effect),
                "p": "" if verdict.claim.margin else f"{f.p:.3g}",
            }
            | {"items": f.effect.n, "seeds": f.seeds, "pairs": f.pairs}
            for f in verdict.findings
        ],
    }


def write(html: str, path: Path) -> None:
    """Write the page completely or not at all; a link, a device and a pipe stay what they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_text(html, encoding="utf-8")
        return
    path = path.resolve()
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_text(html, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)  # half of it, if the disk is full
