"""Compressed files of one model, compared with their original: what each is, and how many facts it kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from knowledge_compression.heavy import pl
from knowledge_compression.results.store import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEY = ["task", "id"]
OTHER_TOKENIZER = "other_tokenizer"  # in a run's report: its original has another tokenizer


def is_file(run: Run) -> bool:
    """Whether a run's model was compressed before, and its original is known."""
    return "file" in run.config


def kept(run: Run, baseline: Run, suite: str) -> dict[str, Any]:
    """What a table shows about a file; all None for any other run.

    Returns:
        ``file``, its name, and ``kept_percent, kept_low, kept_high``: of the items that the original answers right, the
        share that the file still answers right, with its 95 % interval. None if the suite has no right answers, or the
        original knows none.
    """
    from knowledge_compression.statistics import accuracy

    row: dict[str, Any] = dict.fromkeys(("file", "kept_percent", "kept_low", "kept_high"))
    if not is_file(run):
        return row
    row["file"] = run.config["choices"]["compression"]
    before, after = (of.answers(suite, "correct") for of in (baseline, run))
    both = before.join(after, on=KEY, suffix="_after").filter(pl.col("correct"))
    if not both.height:
        return row
    share = accuracy(both["correct_after"].to_numpy())
    return row | {"kept_percent": 100 * share.value, "kept_low": 100 * share.low, "kept_high": 100 * share.high}


def told(run: Run) -> str | None:
    """A line about the file from which a run's model was read; None if it was not compressed."""
    stored: Mapping[str, Any] | None = run.report.get("compression", {}).get("stored")
    if not stored:
        return None
    words = [stored["format"], f"{stored['bits']:.3g} bits a weight"]
    words += [f"{stored['layer_bits']:.3g} with scales", f"{stored['model_bits']:.3g} over the whole model"]
    words += [f"groups of {stored['group']}"] if stored.get("group") else []
    words += [f"{stored['bytes'] / 1e6:.1f} MB", *([f"made by {stored['made_by']}"] if stored.get("made_by") else [])]
    name = run.config["choices"]["compression" if is_file(run) else "model"]
    return f"{name}: {', '.join(words)}" + "".join(f"; {note}" for note in stored.get("notes", ()))


def tokens_differ(run: Run) -> str | None:
    """A line if a file's tokenizer is not that of its original."""
    if not run.report.get("dense", {}).get(OTHER_TOKENIZER):
        return None
    names = run.config["choices"]
    return (
        f"{names['compression']} and {names['model']} have different tokenizers: answers are compared by text, and "
        "perplexities, which are means over different tokens, are not"
    )


def kept_figure(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Facts kept against megabytes, one panel per suite and one point per file; None if no file was asked for facts.

    Args:
        rows: the rows of the table, see :func:`kept`.
    """
    from matplotlib.figure import Figure

    points = [row for row in rows if row.get("kept_percent") is not None]
    suites = list(dict.fromkeys(row["suite"] for row in points))
    if not suites:
        return None
    figure = Figure(figsize=(6.4 * len(suites), 4.4), layout="constrained")
    for axes, suite in zip(figure.subplots(1, len(suites), squeeze=False)[0], suites, strict=True):
        for row in (row for row in points if row["suite"] == suite):
            place = row["stored_mb"], row["kept_percent"]
            spread = [[place[1] - row["kept_low"]], [row["kept_high"] - place[1]]]
            axes.errorbar([place[0]], [place[1]], spread, marker="o", capsize=3, linestyle="none")
            axes.annotate(row["file"], place, xytext=(6, 6), textcoords="offset points", fontsize="small")
        axes.set(xlabel="file (MB)", ylabel="facts of the original kept (%)", title=suite)
        axes.margins(x=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
