r"""The published answers of five real models, before and after quantization, item by item.

python experiments/published_answers/study.py DIR/quantization_flips outputs/published_answers \\
    experiments/published_answers

The first argument is the folder of the published answers, the second the store into which they are taken, the third
where tables, figure and the lower part of the README go.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from answers import BENCHMARKS, MODELS, PRECISIONS, SUITE, Key, arrays
from chance import overlap
from shown import ENDS, draw, text_of

from knowledge_compression.analysis import markdown
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.analysis.flips import change_in_accuracy, flips_of
from knowledge_compression.analysis.ledger import fates
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.take import take_results

HERE = Path(__file__).parent
MARKER = "<!-- what follows is written by study.py -->"


def main(data: Path, store: Path, folder: Path) -> None:
    """Take the published answers, and write the study's files into ``folder``."""
    take_results(data, store, HERE / "take.yaml", None, {})
    ledgers = dict(_ledgers(list(RunStore(store))))
    table = counted(ledgers)
    unlike = differences(table, pl.read_csv(HERE / "published" / "table1.csv"))
    answers = arrays(list(RunStore(store)), ledgers)
    table.write_csv(folder / "results.csv", float_precision=4)
    (folder / "figures").mkdir(exist_ok=True)
    together = {p: overlap(answers, answers.flipped(p)) for p in PRECISIONS.values()}
    every = {f"{p}, all flips": overlap(answers, answers.changed[p]) for p in PRECISIONS.values()}
    draw(answers, table, together, folder / "figures" / "flips.png")
    text = text_of(answers, table, unlike, together | every)
    markdown.write_below(MARKER, text, folder / "README.md")


def _ledgers(runs: Sequence[Run]) -> Iterator[tuple[Key, pl.DataFrame]]:
    """What changed, by model, precision and benchmark."""
    for group in compare(runs):
        for run in group.runs:
            ledger = fates(group.dense, run, SUITE)
            for task in BENCHMARKS:
                precision = PRECISIONS[run.config["compression"]["bits"]]
                yield (group.asked.model, precision, task), ledger.filter(pl.col("task") == task)


def counted(ledgers: dict[Key, pl.DataFrame]) -> pl.DataFrame:
    """One row a model, benchmark and precision: counts, and shares with their intervals."""
    rows = []
    for model in MODELS:
        for task in BENCHMARKS:
            for precision in PRECISIONS.values():
                rows.append(
                    {"model": model, "benchmark": task, "precision": precision} | _row(ledgers[model, precision, task])
                )
    return pl.DataFrame(rows)


def _row(ledger: pl.DataFrame) -> dict[str, Any]:
    found, change = flips_of(ledger), change_in_accuracy(ledger)
    assert found is not None and found.all_flips is not None
    named = {"flips": found.flips, "all_flips": found.all_flips, "change": change}
    shares = {f"{name}{end}": getattr(e, of) for name, e in named.items() for end, of in ENDS.items()}
    counts = ("items", "kept", "lost", "gained", "wrong_otherwise")
    told = {name: getattr(found, name) for name in counts}
    return told | {"accuracy": (found.kept + found.gained) / found.items} | shares | {"p": change.p}


def differences(table: pl.DataFrame, published: pl.DataFrame) -> list[str]:
    """The rows and columns in which our counts are not those published; percentages to the digit that is printed."""
    both = published.join(table, on=["model", "benchmark", "precision"], suffix="_ours", maintain_order="left")
    if both.height != published.height:
        return [f"{published.height - both.height} published rows have no answers"]
    found = []
    for row in both.iter_rows(named=True):
        ours = {name: row[f"{name}_ours"] for name in ("lost", "gained", "wrong_otherwise")}
        shares = {"flips": row["flips_ours"], "all_flips": row["all_flips_ours"], "accuracy": row["accuracy_ours"]}
        shares["fp16_accuracy"] = (row["kept"] + row["lost_ours"]) / row["items"]
        unlike = [name for name, count in ours.items() if count != row[name]]
        unlike += [name for name, share in shares.items() if abs(100 * share - row[name]) > 0.0501]
        found += [f"{row['model']} {row['benchmark']} {row['precision']}: {name}" for name in unlike]
    return found


def _usage(arguments: Sequence[str]) -> tuple[Path, Path, Path]:
    if len(arguments) != 3:
        sys.exit("usage: python experiments/published_answers/study.py DATA/quantization_flips STORE FOLDER")
    data, store, folder = map(Path, arguments)
    return data, store, folder


if __name__ == "__main__":
    main(*_usage(sys.argv[1:]))
