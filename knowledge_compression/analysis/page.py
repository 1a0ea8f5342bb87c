"""One self-contained HTML page over a store of runs: overview, charts, findings, a fact explorer, and every run."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape

from knowledge_compression import __version__
from knowledge_compression.analysis.comparisons import KEY, Comparisons, Group, compare, is_dense, items_of
from knowledge_compression.analysis.findings import Verdict, check
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import accuracy, drop


def render(runs: Sequence[Run], skipped: Sequence[tuple[str, str]] = ()) -> str:
    """The page as one string of HTML that needs no network.

    Args:
        runs: finished runs.
        skipped: folders that could not be read, and why; named on the page.
    """
    from plotly.offline import get_plotlyjs

    comparisons = compare(runs)
    verdicts = check(comparisons)
    content = {
        "runs": [_run(run) for run in runs],
        "points": [point for group in comparisons for point in _points(group)],
        "facts": [_facts(group) for group in comparisons],
    }
    template = Environment(
        loader=PackageLoader("knowledge_compression.analysis", "templates"), autoescape=select_autoescape()
    ).get_template("report.html.j2")
    return template.render(
        plotly=get_plotlyjs(),
        content=base64.b64encode(gzip.compress(json.dumps(_finite(content)).encode(), mtime=0)).decode(),
        verdicts=[_verdict(verdict) for verdict in verdicts],
        skipped=[*skipped, *comparisons.skipped],
        counts=_counts(runs, comparisons, verdicts),
        version=__version__,
    )


def _counts(runs: Sequence[Run], comparisons: Comparisons, verdicts: Sequence[Verdict]) -> dict[str, int]:
    return {
        "runs": len(runs),
        "dense baselines": sum(is_dense(run) for run in runs),
        "models": len({run.config["choices"]["model"] for run in runs}),
        "answers": sum(group.items.height * (1 + len(group.runs)) for group in comparisons),
        "findings decided": sum(verdict.status != "undecided" for verdict in verdicts),
    }


def _run(run: Run) -> dict[str, Any]:
    """What the page shows of one run by itself."""
    compression = run.report.get("compression", {})
    return {
        "id": run.id,
        "label": label(run),
        "dense": is_dense(run),
        **{key: run.config["choices"].get(key, "") for key in ("model", "target", "compression", "recovery")},
        "sparsity": compression.get("sparsity", 0.0),
        "bits": compression.get("bits") or None,
        "stored_mb": compression.get("stored_bytes", 0) / 1e6,
        "seed": run.config["seed"],
        "metrics": {key: value for key, value in run.metrics.items() if key.count(".") == 1},
        "note": run.report["model"].get("note", ""),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "environment": run.environment,
        "layers": [
            {key: layer.get(key) for key in ("path", "role", "parameters", "removed", "bits", "error_after")}
            for layer in compression.get("layers", [])
        ],
    }


def label(run: Run) -> str:
    """How a reader tells a run from its neighbours, e.g. ``smollm2 att magnitude 40 %``."""
    choices = run.config["choices"]
    if is_dense(run):
        return f"{choices['model']} dense"
    sparsity = run.report.get("compression", {}).get("sparsity", 0.0)
    parts = [choices["model"], choices["target"], choices["compression"], f"{sparsity:.0%}" if sparsity else ""]
    return " ".join(part for part in [*parts, choices["recovery"]] if part and part != "none")


def _points(group: Group) -> list[dict[str, Any]]:
    """Accuracy and drop of each run of a group, with their intervals."""
    dense = group.correct(group.dense)
    majority = group.dense.metrics.get(f"{group.asked.suite}.majority")
    points = []
    for run in [group.dense, *group.runs]:
        correct = group.correct(run)
        points.append(
            {"run": run.id, "suite": group.asked.suite, "protocol": group.asked.protocol, "majority": majority}
            | {"accuracy": asdict(accuracy(correct)), "drop": asdict(drop(dense, correct))}
        )
    return points


def _facts(group: Group) -> dict[str, Any]:
    """Every item of a group with every run's answer, answers as indices into one list of strings."""
    items = items_of(group.dense, group.asked.suite).select(*KEY, "prompt", "gold").collect()
    strings: dict[str, int] = {}
    answers = {}
    for run in [group.dense, *group.runs]:
        theirs = items.select(KEY).join(
            items_of(run, group.asked.suite).select(*KEY, "prediction", "correct", "log_prob", "rank").collect(),
            on=KEY,
            how="left",
            maintain_order="left",
        )
        answers[run.id] = {
            "said": [strings.setdefault(text or "", len(strings)) for text in theirs["prediction"]],
            "right": [int(bool(right)) for right in theirs["correct"]],
            "gold": [None if value is None else round(value, 2) for value in theirs["log_prob"]],
            "rank": theirs["rank"].to_list(),
        }
    return {
        "suite": group.asked.suite,
        "model": group.asked.model,
        "protocol": group.asked.protocol,
        "task": items["task"].to_list(),
        "question": items["prompt"].to_list(),
        "answer": items["gold"].to_list(),
        "runs": answers,
        "strings": list(strings),
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "name": verdict.claim.name,
        "text": verdict.claim.text,
        "source": verdict.claim.source,
        "status": verdict.status,
        "findings": [
            {"model": f.model, "suite": f.suite, "status": f.status, "effect": str(f.effect), "p": f"{f.p:.3g}"}
            | {"items": f.effect.n, "pairs": f.pairs}
            for f in verdict.findings
        ],
    }


def _finite(value: Any) -> Any:
    """JSON has no nan: what could not be computed becomes null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(html: str, path: Path) -> None:
    """Write the page whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(html, encoding="utf-8")
    scratch.replace(path)
