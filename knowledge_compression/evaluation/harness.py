"""lm-evaluation-harness tasks by name, with their own prompts and metrics, scored by our core or by lm-eval's own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from importlib.metadata import version
from numbers import Real
from statistics import fmean
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.suite import Evaluation, Suite, item_table
from knowledge_compression.evaluation.tasks import LOCAL, fingerprint, load_tasks, local_files
from knowledge_compression.evaluation.tasks.own import of_the_task, sandboxed
from knowledge_compression.heavy import pl
from knowledge_compression.identity import PLACE
from knowledge_compression.models.families import ENCODER

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from knowledge_compression.evaluation.scoring import Scorer

log = logging.getLogger(__name__)

FEWSHOT_SEED = 1234  # lm-eval's own
SCORINGS = ("fast", "stock")
_JUDGES = ("acc", "exact_match")  # decide whether an answer is right; otherwise the task's first metric


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-evaluation-harness, zero-shot by default.

    Attributes:
        tasks: task names; None uses those of ``groups``.
        limit: the first N items of each task, as in lm-eval; None uses all.
        num_fewshot: number of examples before each question; None uses each task's own number.
        data_dir: local files instead of the hub, in the layout of ``tasks/local.yaml``.
        scoring: ``fast`` (our core) or ``stock`` (lm-eval's own ``HFLM``); both give the same answers.
        groups: named groups of tasks, whose mean accuracies are reported besides the mean over all tasks.
        allow_code: whether a user's own task file may name functions, which are then executed.
        skip_missing: leave out, and name, tasks whose local files are missing, instead of refusing to run.
        name: the suite's name in the item table.
    """

    tasks: Sequence[str] | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    data_dir: str | None = field(default=None, metadata=PLACE)
    scoring: str = "fast"
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    allow_code: bool = False
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
        """Digest of the local files; ``hub`` if there are none."""
        return fingerprint(self._asked, self.data_dir, skip_missing=self.skip_missing, allow_code=self.allow_code)

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask all tasks' questions.

        Raises:
            BadInput: the model is an encoder, or a task is unknown.
            DataUnavailable: a task's documents cannot be obtained.
        """
        return self.joined({name: part.evaluate(scorer) for name, part in self.parts().items()})

    def parts(self) -> dict[str, Suite]:
        """One suite per task; all of them are located before the first is asked."""
        loaded = load_tasks(self._available(), self.data_dir, allow_code=self.allow_code)
        return {name: _OneTask(self, name, task) for name, task in loaded.items()}

    def joined(self, parts: Mapping[str, Evaluation]) -> Evaluation:
        """The results of the parts, with the means over them."""
        items = pl.concat([part.items for part in parts.values()])
        metrics = _accuracies(items)
        for part in parts.values():
            metrics |= part.metrics
        not_finite = sum(part.not_finite for part in parts.values())
        if not_finite:  # no mean over an incomplete set of tasks
            sound = [part.metrics for part in parts.values() if not part.not_finite]
            metrics = {"items": float(items.height), "not_finite": float(not_finite)}
            metrics |= {name: value for part in sound for name, value in part.items()}
        else:
            metrics |= self._means(parts, metrics)
        described: dict[str, Any] = {
            "lm_eval": version("lm-eval"),
            "tasks": {name: part.description for name, part in parts.items()},
            "data": "local files" if self.data_dir is not None else "hub",
            "fingerprint": self.fingerprint(),
        }
        if missing := sorted(set(self._asked) - parts.keys()):
            described["missing"] = missing
            described["note"] = f"means are over {', '.join(parts)}; not there: {', '.join(missing)}"
        fallbacks = [fallback for part in parts.values() for fallback in part.fallbacks]
        return Evaluation(metrics, items, described, fallbacks, not_finite)

    def _means(self, parts: Mapping[str, Evaluation], metrics: Mapping[str, float]) -> dict[str, float]:
        """The means over all items and over the groups of tasks, for tasks with right answers."""
        means: dict[str, float] = {}
        sizes = {f"{name}.majority": part.items.height for name, part in parts.items()}
        if guessed := {key: size for key, size in sizes.items() if key in metrics}:
            means["majority"] = sum(metrics[key] * size for key, size in guessed.items()) / sum(guessed.values())
        for group, tasks in self.groups.items():
            if there := [metrics[f"{task}.accuracy"] for task in tasks if f"{task}.accuracy" in metrics]:
                means[f"group.{group}"] = fmean(there)
        if self.groups and "accuracy_macro" in metrics:
            means["average"] = metrics["accuracy_macro"]
        return means

    def _available(self) -> list[str]:
        """The tasks that can be asked."""
        names = []
        for task in self._asked:
            try:
                if self.skip_missing and self.data_dir is not None:
                    local_files(task, self.data_dir, allow_code=self.allow_code)
                names.append(task)
            except DataUnavailable as error:
                log.warning("%s is left out: %s", task, error)
        if not names:
            raise DataUnavailable(f"eval={self.name}: data_dir={self.data_dir} has none of {', '.join(self._asked)}")
        return names


@dataclass(frozen=True)
class _OneTask:
    """One task of a suite, asked on its own; its description is the suite's entry for it."""

    suite: Harness
    name: str
    task: Task

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask the task's questions."""
        from knowledge_compression.evaluation.lm import item_id

        model = scorer.model
        if model.family == ENCODER:
            raise BadInput(
                f"eval={self.suite.name} asks decoders and encoder-decoders, and {model.name} is an encoder; "
                "choose eval=atlas, eval=lama or eval=perplexity"
            )
        results = self._run(scorer)
        by_document: dict[Any, list[Mapping[str, Any]]] = {}  # one sample per filter
        for sample in results["samples"][self.name]:
            by_document.setdefault(sample["doc_id"], []).append(sample)
        with of_the_task(self.name):
            judge = _judge(self.task, results["samples"][self.name])
            rows = [
                {"suite": self.suite.name, "task": self.name, "id": item_id(first["doc_id"], first["doc"])}
                | _answer(self.task, first, judge)
                | ({"filters": [_filtered(one, judge) for one in (first, *others)]} if others else {})
                for first, *others in by_document.values()
            ]
        items = item_table(rows, _extra_columns())
        described = {
            "version": results["versions"][self.name],
            "items": items.height,
            "of": results["n-samples"][self.name]["original"],
            "fewshot": results["n-shot"][self.name],
        }
        return Evaluation(self._metrics(results["results"][self.name], items), items, described)

    def _run(self, scorer: Scorer) -> Mapping[str, Any]:
        """``lm_eval.evaluate``, with what ``simple_evaluate`` sets before it and without the look around the machine
        (``pip list``, compilers, drivers) that it takes after."""
        from lm_eval import evaluate

        from knowledge_compression.evaluation.lm import ScorerLM, stock_lm

        own, asked = self.task.get_config("num_fewshot"), self.suite.num_fewshot
        if own is None or (own != 0 and asked is not None):  # a task's own 0 is never overridden
            self.task.set_config("num_fewshot", asked or 0)
        self.task.set_fewshot_seed(FEWSHOT_SEED)
        self._check_fewshot()
        for step in ("build_all_requests", "apply_filters", "process_results"):  # the task's own limit, not the model's
            setattr(self.task, step, of_the_task(self.name)(getattr(self.task, step)))
        self.task._aggregation_list = {
            name: of_the_task(self.name)(_without_overflow(aggregate))
            for name, aggregate in self.task._aggregation_list.items()
        }
        with sandboxed():
            found = evaluate(
                lm=ScorerLM(scorer) if self.suite.scoring == "fast" else stock_lm(scorer),
                task_dict={"tasks": {self.name: self.task}},
                limit=self.suite.limit,
                bootstrap_iters=0,
                cache_requests=False,  # lm-eval's request cache does not know the model
                log_samples=True,
                confirm_run_unsafe_code=self.suite.allow_code,
            )
        assert found is not None  # it is None on every rank but the first of a distributed run
        return found

    def _check_fewshot(self) -> None:
        """Refuse more few-shot examples than there are documents."""
        wanted = self.task.get_config("num_fewshot") or 0
        if not wanted:
            return
        with of_the_task(self.name):
            there = len(list(self.task.fewshot_docs() or []))
        config = self.task.config
        if (config.fewshot_split or "") == config.test_split:  # the document that is asked cannot be its own example
            there -= 1
        if wanted > there:
            raise BadInput(
                f"task {self.name} has {max(there, 0)} documents for few-shot examples, but {wanted} are needed; "
                f"give eval.{self.suite.name}.num_fewshot={max(there, 0)} or fewer"
            )

    def _metrics(self, found: Mapping[str, Any], items: pl.DataFrame) -> dict[str, float]:
        metrics = {}
        judged = items.filter(pl.col("correct").is_not_null() & pl.col("gold").is_not_null())
        if judged.height == items.height:
            by = "gold_index" if items["gold_index"].null_count() == 0 else "gold"
            metrics[f"{self.name}.majority"] = int(items[by].value_counts()["count"].max()) / items.height  # type: ignore[arg-type]
        told = {tuple(key.split(",", 1)): value for key, value in found.items() if "," in key}
        several = len({filtered for _, filtered in told}) > 1
        for (metric, filtered), value in told.items():
            if isinstance(value, int | float) and not metric.endswith("_stderr"):
                metrics[f"{self.name}.{metric}.{filtered}" if several else f"{self.name}.{metric}"] = float(value)
        return metrics


def _without_overflow(aggregate: Callable[[Any], float]) -> Callable[[Any], float]:
    """A metric of lm-eval; infinite if it is too large for a float."""

    @wraps(aggregate)
    def bounded(values: Any) -> float:
        try:
            return aggregate(values)
        except OverflowError:
            return math.inf

    return bounded


def _accuracies(items: pl.DataFrame) -> dict[str, float]:
    """Accuracies over the tasks whose items are right or wrong or give shares; empty if there are no such tasks."""
    judged = items.with_columns(value=pl.coalesce(pl.col("correct").cast(pl.Float64), "share"))
    judged = judged.filter(pl.col("value").is_not_null())
    metrics = {"items": float(items.height)}
    if judged.is_empty():
        return metrics
    by_task = judged.group_by("task").agg(pl.col("value").mean()).sort("task")
    metrics |= {"accuracy": float(judged["value"].mean()), "accuracy_macro": float(by_task["value"].mean())}  # type: ignore[arg-type]
    return metrics | {f"{task}.accuracy": float(value) for task, value in by_task.iter_rows()}


Judge = tuple[str, str]  # a metric, and the column for its value: correct, or share


def _judge(task: Task, samples: Sequence[Mapping[str, Any]]) -> Judge | None:
    """The metric that is in [0, 1] for every item: right or wrong or, if some values lie between, a share."""
    means = [name for name, how in task.aggregation().items() if getattr(how, "__name__", "") == "mean"]
    for name in (*_JUDGES, *means):
        values = [float(sample[name]) for sample in samples if isinstance(sample.get(name), Real)]
        if len(values) == len(samples) and all(0 <= value <= 1 for value in values):
            return name, "correct" if set(values) <= {0.0, 1.0} else "share"
    return None


def _judged(sample: Mapping[str, Any], judge: Judge | None) -> dict[str, Any]:
    if judge is None:
        return {}
    metric, column = judge
    return {column: bool(sample[metric]) if column == "correct" else float(sample[metric])}


def _filtered(sample: Mapping[str, Any], judge: Judge | None) -> dict[str, Any]:
    """The answer of one document under one filter."""
    return {
        "filter": sample["filter"],
        "prediction": str(sample["filtered_resps"][0]),
        "correct": _judged(sample, judge).get("correct"),
    }


def _answer(task: Task, sample: Mapping[str, Any], judge: Judge | None) -> dict[str, Any]:
    """The answer columns of one document, from lm-eval's log of it."""
    contexts = [str(arguments[0]) for arguments in sample["arguments"]]
    row: dict[str, Any] = {
        # A task with several inputs (WinoGrande) writes its choices into the context and asks for one continuation.
        "prompt": " | ".join(dict.fromkeys(contexts)),
        "correct_norm": bool(sample["acc_norm"]) if "acc_norm" in sample else None,
    } | _judged(sample, judge)
    answers, target = sample["filtered_resps"], sample["target"]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return row | {"log_prob": float(answers[0])}
    if task.OUTPUT_TYPE == "generate_until":
        gold = (target[0] if target else None) if isinstance(target, list) else target
        return row | {"gold": None if gold is None else str(gold), "prediction": str(answers[0])}
    scores = [float(score) for score, _ in answers]
    best = max(range(len(scores)), key=scores.__getitem__)
    choices = [arguments[1].strip() for arguments in sample["arguments"]]
    if task.OUTPUT_TYPE != "multiple_choice" or isinstance(
        target, list
    ):  # any of these, generated greedily or not at all
        said = next((choice for choice, (_, greedy) in zip(choices, answers, strict=True) if greedy), None)
        return row | {"gold": choices[best], "prediction": said, "log_prob": scores[best]}
    if task.multiple_input:
        choices, target = list(task.doc_to_choice(sample["doc"])), task.doc_to_text(sample["doc"])
    gold_index = _place(target, choices)
    row |= {"prediction": choices[best], "prediction_log_prob": scores[best], "choices": len(choices)}
    if gold_index is None:
        return row
    if judge is None:  # none of its metrics is per item, e.g. Matthews' correlation
        row["correct"] = best == gold_index
    wrong = [score for i, score in enumerate(scores) if i != gold_index]
    return row | {
        "gold": choices[gold_index],
        "gold_index": gold_index,
        "log_prob": scores[gold_index],
        "margin": _margin(scores[gold_index], wrong),
        "rank": 1 + sum(score > scores[gold_index] for score in wrong),
    }


def _margin(score: float, wrong: Sequence[float]) -> float | None:
    if not wrong:
        return None
    return score - max(wrong) if all(map(math.isfinite, (score, *wrong))) else math.nan


def _place(target: Any, choices: Sequence[str]) -> int | None:
    """The index of the right choice; None if the document names none of them, which lm-eval counts as wrong."""
    if isinstance(target, str):
        return choices.index(target.strip()) if target.strip() in choices else None
    return int(target) if isinstance(target, int) and 0 <= target < len(choices) else None


def _extra_columns() -> dict[str, pl.DataType]:
    """The columns of its items beside those of every suite."""
    answer = {"filter": pl.String(), "prediction": pl.String(), "correct": pl.Boolean()}
    return {
        "gold_index": pl.Int64(),  # place of the right choice; null where answers are not ranked
        "correct_norm": pl.Boolean(),  # by log-probability per character (lm-eval's acc_norm); null where not defined
        "share": pl.Float64(),  # what an item gives where it is neither right nor wrong, e.g. a share of probability
        # The answer under each filter, where a task has several; the other columns are of the first.
        "filters": pl.List(pl.Struct(answer)),
    }
