"""The table and the figure of a few runs: results, and drops relative to the dense baseline.

Slow results are kept in the user's cache: intervals by the digests of their items, figures by their rows. So showing
runs again needs no library that reads items or draws.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from knowledge_compression.cache import cached_folder, file_digest, kept_finding
from knowledge_compression.identity import digest_of
from knowledge_compression.progress import underway
from knowledge_compression.results.files import is_file, kept, tokens_differ, told
from knowledge_compression.results.store import Run
from knowledge_compression.results.varying import called, text_of, varied

log = logging.getLogger(__name__)

# The headline metric of a suite: the first of these that it has, and whether higher is better.
HEADLINES = {"accuracy": True, "perplexity": False}


def show(runs: Sequence[Run], baselines: Mapping[str, Run], folder: Path | None = None) -> None:
    """Print the table of runs; with a folder, also write it there as CSV, and the figure as PNG and SVG.

    Args:
        runs: finished runs.
        baselines: the dense run of each, by run id.
        folder: where the files are written.
    """
    with underway("comparing the runs"):
        rows = drop_rows(runs, baselines)
    console = Console()
    if not console.is_terminal:
        console = Console(width=190)  # a log keeps whole rows
    for run in {run.id: run for run in [*baselines.values(), *runs]}.values():
        for suite, why in run.void.items():
            console.print(shown(f"{run.id[:8]}: {suite} has no valid result: {why}"), style="red")
    if not rows:
        console.print("these suites have no accuracy or perplexity to compare; their results are in each run's folder")
        return
    names = {run.id: called(run.config["choices"], without=("model",)) for run in runs}
    console.print(as_rich(rows, console.width, names))
    for note in sorted(
        {
            f"{run.report['model']['name']}: {run.report['model']['note']}"
            for run in runs
            if run.report["model"].get("note")
        }
    ):
        console.print(shown(note), style="dim", soft_wrap=True)
    for line_of in (told, tokens_differ, _left_out, _hardly_read):
        for line in sorted(set(filter(None, map(line_of, runs)))):
            console.print(shown(line), style="dim", soft_wrap=True)
    if folder is None:
        return
    by = _file_name(asked_columns(list(rows[0])))
    drawn = cached_folder(f"figures/{digest_of([_code(), version('matplotlib'), rows])}", partial(_write, rows))
    for file in sorted(drawn.glob("[!.]*")):
        shutil.copyfile(file, folder / f"{file.stem}{by}{file.suffix}")
    figures = [f"{file.stem}{by}.png" for file in sorted(drawn.glob("[!.]*.png"))]
    for what, name in [("table", f"table{by}.csv"), *(("figure", name) for name in figures)]:
        console.print(shown(f"{what}: {folder / name}"), soft_wrap=True)  # a path is copied whole


def shown(text: object) -> Text:
    """Text from a store for a terminal: without rich's markup and control characters."""
    return Text("".join(c if c.isprintable() else "�" for c in str(text)))


def _left_out(run: Run) -> str | None:
    """A line about the parts of its own roles that a run's target left out; None if there are none."""
    parts = [part for part in run.report.get("compression", {}).get("left_out", ()) if part["inside"]]
    if not parts:
        return None
    share = sum(part["share"] for part in parts)
    what = ", ".join(sorted({part["reason"] for part in parts}))
    choices = run.config["choices"]
    return f"{choices['model']}, target={choices['target']}: {share:.2%} of the blocks' weights left out ({what})"


def _hardly_read(run: Run) -> str | None:
    """A line about layers compressed without calibration, because hardly any text reached them; None if none."""
    report = run.report.get("compression", {})
    counts = [report.get("fallbacks", {}).get(name, 0) for name in ("few_tokens", "no_tokens")]
    if not any(counts):
        return None
    few, none = counts
    choices = run.config["choices"]
    return (
        f"{choices['model']}, target={choices['target']}, compression={choices['compression']}: {few + none:,} of "
        f"{report['layers_touched']:,} layers were compressed without calibration, because too few tokens "
        f"reached them ({none:,}: none); more corpus.samples reach more experts"
    )


def drop_rows(runs: Sequence[Run], baselines: Mapping[str, Run]) -> list[dict[str, Any]]:
    """One row per run and suite, dense baselines first.

    Returns:
        Rows with the same columns:

        - the settings that vary among the runs: a choice among files under its group (``target``), a setting as
          ``asked_<name>`` (``asked_bits``); None if a run has no such setting;
        - ``suite, metric, value, dense``; ``drop_percent`` (share of the dense value lost; for perplexity, the rise;
          None if the dense value is 0, which leaves nothing to lose); the 95 % intervals ``value_low, value_high`` and
          ``drop_low, drop_high`` (paired bootstrap over items or windows of text); ``majority_percent`` (the drop of
          always giving the most frequent answer);
        - ``reached_sparsity, reached_bits, stored_mb, baseline, run``; the first three are None where a run taken from
          elsewhere does not say them;
        - for files of one model, ``file``, its name, and ``kept_percent, kept_low, kept_high``, see
          :func:`~knowledge_compression.results.files.kept`.
    """
    distinct = {run.id: run for run in [*baselines.values(), *runs]}.values()
    return rows_of([(run, baselines.get(run.id, run), suite) for run in distinct for suite in run.config["eval"]])


def rows_of(pairs: Sequence[tuple[Run, Run, str]]) -> list[dict[str, Any]]:
    """:func:`drop_rows` of each run, its baseline and a suite, of those that have a value to compare.

    A run that several suites compare with different baselines has a row for each.
    """
    distinct = list({run.id: run for run, *_ in pairs}.values())
    settings = varied([run.config for run in distinct])
    said = {
        run.id: {(one.name if one.chosen else f"asked_{one.name}"): one.values[i] for one in settings}
        for i, run in enumerate(distinct)
    }
    asked = [
        (run, baseline, suite, metric)
        for run, baseline, suite in pairs
        if not {suite} & (run.void.keys() | baseline.void.keys())
        and (metric := next((name for name in HEADLINES if f"{suite}.{name}" in run.metrics), None))
        and f"{suite}.{metric}" in baseline.metrics
        and not (metric == "perplexity" and tokens_differ(run))
    ]
    rows = [said[one[0].id] | _row(*one) | intervals for one, intervals in zip(asked, _intervals(asked), strict=True)]
    if any(map(is_file, distinct)):
        rows = [row | kept(*one[:3]) for row, one in zip(rows, asked, strict=True)]
    lists = {name for row in said.values() for name, value in row.items() if not isinstance(value, int | float | None)}
    return [{name: text_of(v) if name in lists and v is not None else v for name, v in row.items()} for row in rows]


def asked_columns(columns: Sequence[str]) -> Sequence[str]:
    """Those columns of :func:`drop_rows` that say what varies."""
    return columns[: columns.index("suite")]


def _file_name(columns: Sequence[str]) -> str:
    """``_by_target_sparsity``: what varies, as part of a file name; empty if nothing varies."""
    words = "_".join(re.sub(r"[^\w.-]+", "-", heading(column)) for column in columns)
    return f"_by_{words}"[:100] if words else ""


def heading(column: str) -> str:
    """What a column is called where people read it."""
    return column.removeprefix("asked_")


@dataclass(frozen=True)
class _Column:
    """A column of the terminal's table.

    Attributes:
        name: its heading.
        cells: the text of each row.
        right: whether it is aligned to the right, as numbers are.
        spare: in a narrow terminal, the columns with the largest number are left out first; None is never left out.
    """

    name: str
    cells: Sequence[Text | str]
    right: bool = True
    spare: int | None = None

    @property
    def says_little(self) -> bool:
        """Whether all rows say the same."""
        return len({str(cell) for cell in self.cells}) == 1


def as_rich(
    rows: Sequence[Mapping[str, Any]], width: int | None = None, names: Mapping[str, str] | None = None
) -> Table:
    """The rows of :func:`drop_rows` as a terminal shows them: the settings that vary, and the results.

    Args:
        rows: the rows.
        width: characters in a line. If rows are longer, columns are left out, those that are the same in all rows
            first; the table's caption names them. None shows all.
        names: what a run is called where no setting varies, by its id.
    """
    columns = _columns(rows, names or {})
    gone: list[_Column] = []
    while True:
        made = _table(rows, columns, gone)
        if width is None or Measurement.get(_WIDE, _WIDE.options, made).maximum <= width:
            return made
        if not (spare := [column for column in columns if column.spare is not None]):
            return _table(rows, *_without_ends(rows, columns, gone))
        gone.append(max(spare, key=lambda column: (column.says_little, column.spare)))
        columns = [column for column in columns if column not in gone]


def _without_ends(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[_Column], gone: Sequence[_Column]
) -> tuple[Sequence[_Column], Sequence[_Column]]:
    """The columns that stay and go where no column can go any more: the drops keep their intervals."""
    plain = _Column("value", [f"{row['value']:.4g}" for row in rows])
    return [plain if column.name == "value" else column for column in columns], [
        *gone,
        _Column("the intervals of value", [""]),
    ]


_WIDE = Console(width=10_000)  # to measure a table that nothing squeezes


def _columns(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[_Column]:
    asked = asked_columns(list(rows[0]))
    alone = {} if asked else names
    called_by = ["dense" if row["run"] == row["baseline"] else alone.get(row["run"], "") for row in rows]
    texts = {name for name in asked if any(isinstance(row[name], str) for row in rows)}

    def known(name: str, form: str) -> list[str]:
        return ["" if (value := row.get(name)) is None else f"{value:{form}}" for row in rows]

    return [
        _Column("", [shown(name) for name in called_by], right=False),
        *(_Column(heading(name), [shown(text_of(row[name])) for row in rows], name not in texts) for name in asked),
        _Column("suite", [shown(row["suite"]) for row in rows], right=False, spare=0),
        _Column("metric", [shown(row["metric"]) for row in rows], right=False, spare=1),
        _Column("reached sparsity", known("reached_sparsity", ".1%"), spare=4),
        _Column("reached bits", known("reached_bits", ".3g"), spare=2),
        _Column("MB stored", known("stored_mb", ".0f"), spare=3),
        _Column("value", [_with_interval(row, "value", ".4g") for row in rows]),
        _Column("drop %", [_with_interval(row, "drop", "+.1f") for row in rows]),
        *([_Column("kept %", known("kept_percent", ".1f"))] if "kept_percent" in rows[0] else []),
        _Column("majority: drop %", known("majority_percent", "+.1f"), spare=6),
        _Column("run", [shown(row["run"][:8]) for row in rows], spare=5),
    ]


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[_Column], gone: Sequence[_Column]) -> Table:
    said = [column for name in ("suite", "metric") for column in gone if column.name == name and column.says_little]
    title = " ".join(["What compression did" + ":" * bool(said), *(str(column.cells[0]) for column in said)])
    others = [column.name for column in gone if column not in said]
    caption = f"no room for: {', '.join(others)}" if others else None
    made = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in columns:
        made.add_column(column.name, justify="right" if column.right else "left")
    for i in range(len(rows)):
        made.add_row(*(column.cells[i] for column in columns))
    return made


def _row(run: Run, baseline: Run, suite: str, metric: str) -> dict[str, Any]:
    report = run.report.get("compression", {})
    sign = 1.0 if HEADLINES[metric] else -1.0
    value, reference = run.metrics[f"{suite}.{metric}"], baseline.metrics[f"{suite}.{metric}"]
    majority = run.metrics.get(f"{suite}.majority")
    return {
        "suite": suite,
        "metric": metric,
        "value": value,
        "dense": reference,
        "drop_percent": _percent_lost(value, reference, sign),
        **dict.fromkeys(("value_low", "value_high", "drop_low", "drop_high")),
        "majority_percent": None if majority is None else _percent_lost(majority, reference, sign),
        "reached_sparsity": report.get("sparsity", None if run.taken else 0.0),
        "reached_bits": report.get("bits") or (None if run.taken else 32.0),
        "stored_mb": run.stored_mb,
        "baseline": baseline.id,
        "run": run.id,
    }


def _intervals(asked: Sequence[tuple[Run, Run, str, str]]) -> list[dict[str, float]]:
    """As :func:`~knowledge_compression.results.drawing.intervals`, computed once for items with the same bytes."""

    def find() -> list[dict[str, float]]:
        from knowledge_compression.results.drawing import intervals

        return intervals(asked)

    of = [[run.items_digest, baseline.items_digest, *what] for run, baseline, *what in asked]
    if any(digest is None for digest, *_ in of) or any(digest is None for _, digest, *_ in of):
        return find()
    found: list[dict[str, float]] = kept_finding("intervals", [_code(), of], find)
    return found


def _write(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    from knowledge_compression.results.drawing import write

    write(rows, folder)


_CODE = ("statistics.py", "resampling.py", "results/drawing.py", "results/files.py")


def _code() -> list[str]:
    """Digests of the code that computes intervals and draws; cached results of other code are not used."""
    package = Path(__file__).parents[1]
    return [file_digest(package / file) for file in _CODE]


def _with_interval(row: Mapping[str, Any], name: str, form: str) -> str:
    value = row["drop_percent"] if name == "drop" else row[name]
    if value is None:
        return ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    inner = form.removeprefix("+")
    return f"{value:{form}}" + ("" if low is None else f" [{low:{inner}}, {high:{inner}}]")


def _percent_lost(value: float, reference: float, sign: float) -> float | None:
    return 100.0 * sign * (reference - value) / reference + 0.0 if reference else None  # + 0.0: never minus zero
