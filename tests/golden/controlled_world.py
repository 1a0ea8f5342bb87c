"""Answers of the controlled world study's finished runs, in two small files: the store of the golden report.

python tests/golden/controlled_world.py outputs/controlled_world

Kept of each run are its settings and, for each fact in a held-out wording, whether it was recalled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import polars as pl

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.comparisons import Comparisons, compare
from knowledge_compression.analysis.findings import Verdict, check
from knowledge_compression.analysis.naming import reading_order
from knowledge_compression.evaluation.suite import item_table
from knowledge_compression.results.store import Run, RunStore

FOLDER = Path(__file__).parent
ANSWERS, RUNS, REPORT = (FOLDER / f"controlled_world.{suffix}" for suffix in ("parquet", "json", "md"))
KEPT = ("target", "compression", "recovery", "sparsity", "reading", "seed", "choices")


def keep(store: Path) -> None:
    """Write the two files from a store."""
    columns: dict[str, pl.DataFrame] = {}
    runs = []
    for run in sorted(RunStore(store), key=reading_order):
        held_out = run.only(pl.col("asked_as") == "held_out").scan_items()
        items = held_out.select("task", "id", "bin", "correct").sort("id").collect()
        model = run.config["choices"]["model"]
        known = columns.setdefault(model, items.select(pl.lit(model).alias("model"), "task", "id", "bin"))
        assert known["id"].equals(items["id"])
        columns[model] = known.with_columns(items["correct"].alias(run.id))
        report = {"family": run.report["model"]["family"], "sparsity": run.report["compression"].get("sparsity")}
        runs.append({"id": run.id, "config": {key: run.config.get(key) for key in KEPT}, **report})
    pl.concat(columns.values(), how="diagonal").write_parquet(ANSWERS, compression="zstd", compression_level=19)
    RUNS.write_text("\n".join(json.dumps(run, separators=(",", ":")) for run in runs) + "\n")


def kept() -> list[Run]:
    """The runs again, in memory."""
    answers = pl.read_parquet(ANSWERS)
    return [_run(json.loads(line), answers) for line in RUNS.read_text().splitlines()]


def _run(kept: dict, answers: pl.DataFrame) -> Run:
    model = kept["config"]["choices"]["model"]
    theirs = answers.filter(pl.col("model") == model)
    items = theirs.select(pl.lit("world").alias("suite"), "task", "id", "bin", pl.col(kept["id"]).alias("correct"))
    return Run(
        id=kept["id"],
        config=kept["config"] | {"eval": {"world": {}}},
        metrics={"world.accuracy": float(items["correct"].mean())},
        report={
            "model": {"name": model, "family": kept["family"]},
            "compression": {"sparsity": kept["sparsity"]},
            "eval": {"world": {}},
        },
        environment={},
        _items=pl.concat([item_table([]), items], how="diagonal"),
    )


def judged() -> tuple[Comparisons, list[Verdict]]:
    """Their comparisons, and the verdicts on them."""
    comparisons = compare(kept())
    return comparisons, check(comparisons)


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
    REPORT.write_text(markdown.report(*judged()), encoding="utf-8")
