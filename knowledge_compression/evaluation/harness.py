"""lm-evaluation-harness tasks by name, with their own prompts and metrics, scored by our core or by lm-eval's own."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from importlib.metadata import version
from statistics import fmean
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.samples import accuracies, answer_of, by_document, extra_columns, judge_of
from knowledge_compression.evaluation.suite import Evaluation, Suite, item_table
from knowledge_compression.evaluation.tasks import LOCAL, fingerprint, load_tasks, local_files, names_of
from knowledge_compression.evaluation.tasks.own import of_the_task, sandboxed
from knowledge_compression.heavy import pl
from knowledge_compression.identity import PLACE
from knowledge_compression.models.families import ENCODER

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from knowledge_compression.evaluation.scoring import Scorer

log = logging.getLogger(__name__)

FEWSHOT_SEED = 1234  # lm-eval's own default
SCORINGS = ("fast", "stock")


@dataclass(frozen=True)
class Harness:
    """Tasks of lm-evaluation-harness, zero-shot by default.

    Attributes:
        tasks: names of tasks, or of groups or tags, which stand for all their tasks; None uses those of ``groups``.
        limit: the first N items of each task, as in lm-eval; None uses all.
        num_fewshot: number of examples before each question; None uses each task's own number.
        data_dir: local files instead of the hub, in the layout of ``tasks/local.yaml``.
        scoring: ``fast`` (our core) or ``stock`` (lm-eval's own ``HFLM``); both give the same answers.
        groups: named groups of tasks, whose mean accuracies are reported besides the mean over all tasks.
        allow_code: whether a user's own task file may name functions, which are then executed.
        skip_missing: leave out tasks whose local files are missing, and report them, instead of refusing to run.
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
            known = ", ".join(LOCAL)
            raise BadInput(f"eval.{self.name}.tasks={self.tasks} contains no task; give a list, e.g. [{known}]")
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
        return {
            name: _OneTask(
                self, name, task, {of: group.means for of, group in loaded.groups.items() if name in group.tasks}
            )
            for name, task in loaded.tasks.items()
        }

    def joined(self, parts: Mapping[str, Evaluation]) -> Evaluation:
        """The results of the parts, with the means over them."""
        items = pl.concat([part.items for part in parts.values()])
        metrics = accuracies(items)
        for part in parts.values():
            metrics |= part.metrics
        not_finite = sum(part.not_finite for part in parts.values())
        if not_finite:  # there is no mean over an incomplete set of tasks
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
        if missing := sorted(set(self._named) - parts.keys()) if self.data_dir is not None else []:
            described["missing"] = missing
            described["note"] = f"means are over {', '.join(parts)}; missing: {', '.join(missing)}"
        fallbacks = [fallback for part in parts.values() for fallback in part.fallbacks]
        return Evaluation(metrics, items, described, fallbacks, not_finite)

    def _means(self, parts: Mapping[str, Evaluation], metrics: Mapping[str, float]) -> dict[str, float]:
        """The means over all items and over the groups of tasks, for tasks with right answers."""
        means: dict[str, float] = {}
        sizes = {name: part.items.height for name, part in parts.items() if f"{name}.accuracy" in metrics}
        if sizes and all(f"{name}.majority" in metrics for name in sizes):  # over the items of the accuracy
            means["majority"] = sum(metrics[f"{name}.majority"] * n for name, n in sizes.items()) / sum(sizes.values())
        for group, tasks in self.groups.items():
            if there := [metrics[f"{task}.accuracy"] for task in tasks if f"{task}.accuracy" in metrics]:
                means[f"group.{group}"] = fmean(there)
        if self.groups and "accuracy_macro" in metrics:
            means["average"] = metrics["accuracy_macro"]
        return means | _group_means(parts)

    @property
    def _named(self) -> list[str]:
        """The tasks that are selected by name or by group, as far as this is known here."""
        return names_of(self._asked, self.data_dir, allow_code=self.allow_code).tasks

    def _available(self) -> list[str]:
        """The tasks, groups and tags that can be evaluated."""
        if not self.skip_missing or self.data_dir is None:
            return self._asked
        names = []
        for task in self._named:
            try:
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
    groups: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)  # the metrics that each group averages

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask the task's questions."""
        from knowledge_compression.evaluation.lm import item_id

        model = scorer.model
        if model.family == ENCODER:
            raise BadInput(
                f"eval={self.suite.name} needs a decoder or an encoder-decoder, and {model.name} is an encoder; "
                "choose eval=atlas, eval=lama or eval=perplexity"
            )
        results = self._run(scorer)
        samples = results["samples"][self.name]
        means = [name for name, how in self.task.aggregation().items() if getattr(how, "__name__", "") == "mean"]
        with of_the_task(self.name):
            judge = judge_of(means, samples)
            rows = [
                {"suite": self.suite.name, "task": self.name, "id": item_id(of[0]["doc_id"], of[0]["doc"])}
                | answer_of(of, self.task.OUTPUT_TYPE, judge, _inputs(self.task, of[0]["doc"]))
                for of in by_document(samples)
            ]
        items = item_table(rows, extra_columns())
        described = {
            "version": results["versions"][self.name],
            "items": items.height,
            "of": results["n-samples"][self.name]["original"],
            "fewshot": results["n-shot"][self.name],
        } | ({"groups": self.groups} if self.groups else {})
        return Evaluation(self._metrics(results["results"][self.name], items), items, described)

    def _run(self, scorer: Scorer) -> Mapping[str, Any]:
        """``lm_eval.evaluate`` as ``simple_evaluate`` calls it, without its listing of packages and drivers."""
        from lm_eval import evaluate

        from knowledge_compression.evaluation.lm import ScorerLM, stock_lm

        own, asked = self.task.get_config("num_fewshot"), self.suite.num_fewshot
        if own is None or (own != 0 and asked is not None):  # a task that sets 0 itself is never overridden
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
        assert found is not None  # None on every rank of a distributed run except the first
        return found

    def _check_fewshot(self) -> None:
        """Refuse more few-shot examples than there are documents."""
        wanted = self.task.get_config("num_fewshot") or 0
        if not wanted:
            return
        with of_the_task(self.name):
            there = len(list(self.task.fewshot_docs() or []))
        config = self.task.config
        if config.fewshot_split == config.test_split:  # lm-eval draws one more, so that no document is its own example
            there -= 1
        if wanted > there:
            raise BadInput(
                f"task {self.name} has {max(there, 0)} documents for few-shot examples, but {wanted} are needed; "
                f"set eval.{self.suite.name}.num_fewshot={max(there, 0)} or less"
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


def _group_means(parts: Mapping[str, Evaluation]) -> dict[str, float]:
    """lm-eval's metrics of its groups: means over their tasks, weighted by items if the group sets this."""
    values: dict[str, list[tuple[float, int]]] = {}
    for task, part in parts.items():
        for group, means in part.description.get("groups", {}).items():
            for metric, by_size in means.items():
                name = f"{task}.{metric}"
                for key in (key for key in part.metrics if key == name or key.startswith(f"{name}.")):
                    of = values.setdefault(f"{group}.{key.removeprefix(f'{task}.')}", [])
                    of.append((part.metrics[key], part.items.height if by_size else 1))
    return {name: sum(v * n for v, n in of) / sum(n for _, n in of) for name, of in values.items()}


def _without_overflow(aggregate: Callable[[Any], float]) -> Callable[[Any], float]:
    """A metric of lm-eval; infinite if it is too large for a float."""

    @wraps(aggregate)
    def bounded(values: Any) -> float:
        try:
            return aggregate(values)
        except OverflowError:
            return math.inf

    return bounded


def _inputs(task: Task, document: Any) -> tuple[list[str], int | str | None] | None:
    """The choices in the inputs of a task with several inputs, and the index of the right one; None with one input."""
    return (list(task.doc_to_choice(document)), task.doc_to_text(document)) if task.multiple_input else None
