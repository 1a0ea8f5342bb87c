"""The tables of both papers from any store of runs, the published figures beside ours where there are some."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from knowledge_compression.analysis.comparisons import Comparisons, Group
from knowledge_compression.results.store import Run
from knowledge_compression.statistics import Estimate, accuracy, macro_accuracy

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"

# Columns of Tables 3-5 of The Cost of Compression: heading, compression, targets that stand for it, sparsity asked.
OVERALL, ATT, FF = ("overall", "all"), ("att",), ("ff",)
COST_COLUMNS: tuple[tuple[str, str, tuple[str, ...], float | None], ...] = (
    ("overall_gq", "int8_dynamic", OVERALL, None),
    ("att_gq", "int8_dynamic", ATT, None),
    ("ff_gq", "int8_dynamic", FF, None),
    ("overall_gpq_20", "prune_int8", OVERALL, 0.2),
    ("overall_gpq_40", "prune_int8", OVERALL, 0.4),
    ("att_gpq_20", "prune_int8", ATT, 0.2),
    ("att_gpq_40", "prune_int8", ATT, 0.4),
    ("ff_gpq_20", "prune_int8", FF, 0.2),
    ("ff_gpq_40", "prune_int8", FF, 0.4),
)

# Which of our models and tasks the published tables call what, and whether they print percentages.
_PUBLISHED_MODELS = {
    "bert_base": "BERT-base",
    "bert_large": "BERT-large",
    "roberta_base": "RoBERTa-base",
    "roberta_large": "RoBERTa-large",
    "distilbert": "DistilBERT-base",
    "albert_base": "ALBERT-base",
    "albert_large": "ALBERT-large",
    "vicuna": "Vicuna-7B",
    "wizardlm": "WizardLM-7B",
    "flan_t5_base": "FlanT5-Base",
    "flan_t5_large": "FlanT5-Large",
    "lamini_flan_t5_248m": "Lamini-Flan-T5-248M",
    "lamini_flan_t5_783m": "Lamini-Flan-T5-783M",
}
_PUBLISHED_DATA = {"TREx": "TRex", "Google_RE": "GoogleRe", "Squad": "Squad", "ConceptNet": "Conceptnet"} | {
    "boolq": "Boolq",
    "piqa": "Piqa",
    "winogrande": "Winogrande",
}
_PERCENT = {"TREx", "Google_RE", "Squad", "ConceptNet"}


@dataclass(frozen=True)
class PaperTable:
    """A table ready to be written.

    Attributes:
        name: of the files.
        caption: what it shows.
        rows: one dictionary a row, the same keys in each; figures with intervals are :class:`Estimate`.
    """

    name: str
    caption: str
    rows: Sequence[Mapping[str, Any]]

    def frame(self) -> pl.DataFrame:
        """Plain columns: ``x`` with ``x_low`` and ``x_high`` for every figure that has an interval."""
        return pl.DataFrame([dict(_flat(row)) for row in self.rows], infer_schema_length=None)

    def latex(self) -> str:
        """A tabular with booktabs rules, intervals in brackets."""
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        rows = [[str(key) for key in keys], *([_cell(row.get(key)) for key in keys] for row in self.rows)]
        head, *body = [" & ".join(map(_escaped, row)) + r" \\" for row in rows]
        opening = rf"\begin{{tabular}}{{{'l' * len(keys)}}}"
        return "\n".join([opening, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""])


def cost_table(comparisons: Comparisons) -> PaperTable:
    """Tables 3-5 of The Cost of Compression: int8, and pruning then int8, of everything, attention and feed-forward."""
    published = {row["model"] + row["dataset"]: row for number in (3, 4, 5) for row in _published_cost(number)}
    rows = []
    for group in comparisons:
        found = {name: _find(group, how, targets, share) for name, how, targets, share in COST_COLUMNS}
        if not any(found.values()):
            continue
        for data_set, mask in data_sets(group):
            row: dict[str, Any] = {"model": group.asked.model, "suite": group.asked.name, "data_set": data_set}
            theirs = published.get(_PUBLISHED_MODELS.get(group.asked.model, "") + _PUBLISHED_DATA.get(data_set, ""))
            row["baseline"] = accuracy(group.correct(group.dense)[mask])
            row |= {name: accuracy(group.answers(run)[:, mask]) if run else None for name, run in found.items()}
            for name in ("baseline", *found) if theirs else ():
                scale = 100 if data_set in _PERCENT else 1
                row[f"{name}_published"] = float(theirs[name]) / scale  # type: ignore[index]
            rows.append(row)
    caption = "Accuracy after int8 (gq) and after pruning to 20 or 40 % and then int8 (gpq), with 95 % intervals."
    return PaperTable("cost_of_compression", caption, rows)


def recovery_table(comparisons: Comparisons) -> PaperTable:
    """Tables 1-2 of Do Compressed LLMs Forget Knowledge?: what each recovery gives, by task, group and on average."""
    rows = []
    for group in comparisons:
        recovered = [run for run in group.runs if run.config["choices"]["recovery"] != "none"]
        bare = [run for run in group.runs if run.config["choices"]["recovery"] == "none"]
        if not recovered:
            continue
        for run in [group.dense, *sorted([*bare, *recovered], key=_recovery_order)]:
            choices = run.config["choices"]
            trained = run.report["recovery"].get("trainable_parameters", 0)
            row: dict[str, Any] = {"model": group.asked.model, "compression": choices["compression"]}
            row |= {"seeds": len(group.seeds_of(run))}
            row |= {"target": choices["target"] if run is not group.dense else "", "recovery": choices["recovery"]}
            row |= {"corpus": choices.get("corpus", ""), "trained": trained, "suite": group.asked.name}
            correct = group.answers(run)
            by_task = {name: correct[:, mask] for name, mask in data_sets(group)}
            row |= {name: accuracy(answers) for name, answers in by_task.items()}
            for name, tasks in run.config["eval"][group.asked.suite].get("groups", {}).items():
                if there := [by_task[task] for task in tasks if task in by_task]:
                    row[name] = macro_accuracy(there)
            row["average"] = macro_accuracy(list(by_task.values()))
            rows.append(row)
    caption = "Accuracy of compressed models and of what each recovery makes of them, with 95 % intervals."
    return PaperTable("forgotten_or_displaced", caption, rows)


def data_sets(group: Group) -> Iterator[tuple[str, Any]]:
    """The data sets of a group's suite: name and mask over its items (LAMA's relations by the set they belong to)."""
    tasks = group.items["task"].str.split(".").list.first()
    for name in tasks.unique(maintain_order=True):
        yield name, (tasks == name).to_numpy()


def write(table: PaperTable, folder: Path) -> list[Path]:
    """Write a table as CSV and LaTeX; nothing where it has no rows."""
    if not table.rows:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{table.name}.csv", folder / f"{table.name}.tex"]
    table.frame().write_csv(paths[0])
    paths[1].write_text(f"% {table.caption}\n{table.latex()}")
    return paths


def _find(group: Group, compression: str, targets: tuple[str, ...], sparsity: float | None) -> Run | None:
    for target in targets:
        for run in group.runs:
            choices = run.config["choices"]
            if choices["compression"] != compression or choices["target"] != target or choices["recovery"] != "none":
                continue
            if sparsity is None or abs(run.config["sparsity"] - sparsity) < 1e-9:
                return run
    return None


def _published_cost(number: int) -> list[dict[str, str]]:
    path = EXPERIMENTS / "cost_of_compression" / "published" / f"table{number}.csv"
    return list(csv.DictReader(path.open())) if path.is_file() else []


def _recovery_order(run: Run) -> tuple[str, bool, str, int]:
    choices = run.config["choices"]
    trained = run.report["recovery"].get("trainable_parameters", 0)
    return choices["compression"], choices["recovery"] != "none", choices["recovery"], trained


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Estimate):
            yield from ((key, value.value), (f"{key}_low", value.low), (f"{key}_high", value.high))
        else:
            yield key, value


def _cell(value: Any) -> str:
    if value is None:
        return "--"
    if isinstance(value, Estimate):
        return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return f"{100 * value:.1f}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")
