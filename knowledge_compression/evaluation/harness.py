"""lm-evaluation-harness tasks by name, with their own prompts and metrics, scored by our core or by lm-eval's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import fmean
from typing import TYPE_CHECKING, Any

import polars as pl

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.suite import Evaluation, accuracy_metrics, item_table
from knowledge_compression.evaluation.tasks import LOCAL, fingerprint, load_tasks, local_files
from knowledge_compression.models import Model
from knowledge_compression.models.families import ENCODER

if TYPE_CHECKING:
    from lm_eval.api.task import Task

log = logging.getLogger(__name__)

FEWSHOT_SEED = 1234  # lm-eval's own
SCORINGS = ("fast", "stock")
EXTRA_COLUMNS: Mapping[str, pl.DataType] = {
    "gold_index": pl.Int64(),  # place of the right choice; null where answers are not ranked
    "correct_norm": pl.Boolean(),  # by log-probability per character (lm-eval's acc_norm); null where not defined
}


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-evaluation-harness, zero-shot unless said otherwise.

    Attributes:
        tasks: task names; None takes those of ``groups``.
        limit: the first N items of each task, as lm-eval takes them; None takes all.
        num_fewshot: examples before each question; None takes each task's own number.
        data_dir: local files instead of the hub, in the layout of ``tasks/local.yaml``.
        scoring: ``fast`` (our core) or ``stock`` (lm-eval's own ``HFLM``); both give the same answers.
        groups: names of groups of tasks, whose mean accuracies are given beside the mean over all tasks.
        skip_missing: leave out (and name) tasks whose local files are not there, instead of refusing.
        name: what its items are filed under.
    """

    tasks: Sequence[str] | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    data_dir: str | None = None
    scoring: str = "fast"
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    skip_missing: bool = False
    name: str = "harness"

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise BadInput(f"scoring={self.scoring} does not exist; choose one of {', '.join(SCORINGS)}")
        if isinstance(self.tasks, str) or not self._asked:
            raise BadInput(f"eval.{self.name}.tasks={self.tasks} names no task; give a list, e.g. [{', '.join(LOCAL)}]")
        for option, least in (("limit", 1), ("num_fewshot", 0)):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, int) or value < least):
                raise BadInput(f"eval.{self.name}.{option}={value} is not a whole number from {least} on (or null)")

    @property
    def _asked(self) -> list[str]:
        asked = self.tasks or [task for group in self.groups.values() for task in group]
        return list(dict.fromkeys(asked))

    def fingerprint(self) -> str:
        """Digest of the local files; ``hub`` where there are none."""
        return fingerprint(self._asked, self.data_dir, skip_missing=self.skip_missing)

    def evaluate(self, model: Model) -> Evaluation:
        """Ask all tasks' questions.

        Raises:
            BadInput: the model is an encoder, or a task is unknown.
            DataUnavailable: a task's documents are not to be had.
        """
        if model.family == ENCODER:
            raise BadInput(
                f"eval={self.name} asks decoders and encoder-decoders, and {model.name} is an encoder; "
                "choose eval=atlas, eval=lama or eval=perplexity"
            )
        names, missing = self._available()
        tasks = load_tasks(names, self.data_dir)
        results = self._run(model, tasks)
        rows = [
            {"suite": self.name, "task": name, "id": f"{sample['doc_id']}:{sample['doc_hash'][:12]}"}
            | _answer(tasks[name], sample)
            for name, samples in results["samples"].items()
            for sample in samples
        ]
        items = item_table(rows, EXTRA_COLUMNS)
        return Evaluation(self._metrics(results, items), items, self._description(results, missing))

    def _available(self) -> tuple[list[str], dict[str, str]]:
        """The tasks that can be asked, and why the others cannot."""
        missing: dict[str, str] = {}
        if self.skip_missing and self.data_dir is not None:
            for task in self._asked:
                try:
                    local_files(task, self.data_dir)
                except DataUnavailable as error:
                    missing[task] = str(error)
                    log.warning("%s is left out: %s", task, error)
        names = [task for task in self._asked if task not in missing]
        if not names:
            raise DataUnavailable(f"eval={self.name}: data_dir={self.data_dir} has none of {', '.join(self._asked)}")
        return names, missing

    def _run(self, model: Model, tasks: Mapping[str, Task]) -> Mapping[str, Any]:
        """``lm_eval.evaluate``, with what ``simple_evaluate`` sets before it and without the look around the machine
        (``pip list``, compilers, drivers) that it takes after."""
        from lm_eval import evaluate

        from knowledge_compression.evaluation.lm import ScorerLM, stock_lm

        for task in tasks.values():
            own = task.get_config("num_fewshot")
            if own is None or (own != 0 and self.num_fewshot is not None):  # a task's own 0 is never overruled
                task.set_config("num_fewshot", self.num_fewshot or 0)
            task.set_fewshot_seed(FEWSHOT_SEED)
        found = evaluate(
            lm=ScorerLM(model) if self.scoring == "fast" else stock_lm(model),
            task_dict={"tasks": dict(tasks)},
            limit=self.limit,
            bootstrap_iters=0,
            cache_requests=False,  # lm-eval's request cache does not know the model
            log_samples=True,
        )
        assert found is not None  # it is, on every rank but the first of a distributed run
        return found

    def _metrics(self, results: Mapping[str, Any], items: pl.DataFrame) -> dict[str, float]:
        metrics = accuracy_metrics(items)
        hits = {}
        for (task,), rows in items.group_by("task", maintain_order=True):
            by = "gold_index" if rows["gold_index"].null_count() == 0 else "gold"
            hits[task] = int(rows[by].value_counts()["count"].max())  # type: ignore[arg-type]
            metrics[f"{task}.majority"] = hits[task] / rows.height
            for key, value in results["results"][task].items():
                metric, comma, _ = key.partition(",")
                if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
                    metrics[f"{task}.{metric}"] = float(value)
        metrics["majority"] = sum(hits.values()) / items.height
        for group, tasks in self.groups.items():
            there = [metrics[f"{task}.accuracy"] for task in tasks if task in hits]
            if there:
                metrics[f"group.{group}"] = fmean(there)
        if self.groups:
            metrics["average"] = metrics["accuracy_macro"]
        return metrics

    def _description(self, results: Mapping[str, Any], missing: Mapping[str, str]) -> dict[str, Any]:
        asked = list(results["samples"])
        described: dict[str, Any] = {
            "lm_eval": version("lm-eval"),
            "tasks": {
                task: {
                    "version": results["versions"][task],
                    "items": len(results["samples"][task]),
                    "of": results["n-samples"][task]["original"],
                    "fewshot": results["n-shot"][task],
                }
                for task in asked
            },
            "data": "local files" if self.data_dir is not None else "hub",
            "fingerprint": self.fingerprint(),
        }
        if missing:
            described["missing"] = sorted(missing)
            described["note"] = f"means are over {', '.join(asked)}; not there: {', '.join(sorted(missing))}"
        return described


def _answer(task: Task, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The answer columns of one document, from what lm-eval logged of it."""
    contexts = [arguments[0] for arguments in sample["arguments"]]
    row: dict[str, Any] = {
        # A task with several inputs (WinoGrande) writes its choices into the context and asks for one continuation.
        "prompt": " | ".join(dict.fromkeys(contexts)),
        "correct": bool(sample["acc"] if "acc" in sample else sample["exact_match"]),
        "correct_norm": bool(sample["acc_norm"]) if "acc_norm" in sample else None,
    }
    answers, target = sample["filtered_resps"], sample["target"]
    if task.OUTPUT_TYPE == "generate_until":
        return row | {"gold": target[0] if isinstance(target, list) else str(target), "prediction": answers[0]}
    scores = [float(score) for score, _ in answers]
    best = max(range(len(scores)), key=scores.__getitem__)
    choices = [arguments[1].strip() for arguments in sample["arguments"]]
    if task.OUTPUT_TYPE != "multiple_choice" or isinstance(target, list):  # any of these, said greedily or not at all
        said = next((choice for choice, (_, greedy) in zip(choices, answers, strict=True) if greedy), None)
        return row | {"gold": choices[best], "prediction": said, "log_prob": scores[best]}
    if task.multiple_input:
        choices, target = list(task.doc_to_choice(sample["doc"])), task.doc_to_text(sample["doc"])
    gold = target if isinstance(target, int) else choices.index(target.strip())
    wrong = [score for i, score in enumerate(scores) if i != gold]
    return row | {
        "gold": choices[gold],
        "gold_index": gold,
        "prediction": choices[best],
        "log_prob": scores[gold],
        "margin": scores[gold] - max(wrong),
        "rank": 1 + sum(score > scores[gold] for score in wrong),
        "choices": len(choices),
    }
