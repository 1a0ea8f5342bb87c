"""lm-evaluation-harness tasks by name, with their own prompts and metrics, scored by our core or by lm-eval's."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import fmean
from typing import TYPE_CHECKING, Any

import polars as pl

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.suite import Evaluation, Suite, accuracy_metrics, item_table
from knowledge_compression.evaluation.tasks import LOCAL, fingerprint, load_tasks, local_files
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

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask all tasks' questions.

        Raises:
            BadInput: the model is an encoder, or a task is unknown.
            DataUnavailable: a task's documents are not to be had.
        """
        return self.joined({name: part.evaluate(scorer) for name, part in self.parts().items()})

    def parts(self) -> dict[str, Suite]:
        """One suite a task; all of them are found before the first is asked."""
        return {name: _OneTask(self, name, task) for name, task in load_tasks(self._available(), self.data_dir).items()}

    def joined(self, parts: Mapping[str, Evaluation]) -> Evaluation:
        """What the parts found, with the means over them."""
        items = pl.concat([part.items for part in parts.values()])
        metrics = accuracy_metrics(items)
        for part in parts.values():
            metrics |= part.metrics
        not_finite = sum(part.not_finite for part in parts.values())
        if not_finite:  # no mean over what is left of the tasks
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
        """Over all items and over the groups of tasks."""
        asked = sum(part.items.height for part in parts.values())
        majority = sum(metrics[f"{name}.majority"] * part.items.height for name, part in parts.items()) / asked
        means = {"majority": majority}
        for group, tasks in self.groups.items():
            if there := [metrics[f"{task}.accuracy"] for task in tasks if task in parts]:
                means[f"group.{group}"] = fmean(there)
        return means | ({"average": metrics["accuracy_macro"]} if self.groups else {})

    def _available(self) -> list[str]:
        """The tasks that can be asked."""
        names = []
        for task in self._asked:
            try:
                if self.skip_missing and self.data_dir is not None:
                    local_files(task, self.data_dir)
                names.append(task)
            except DataUnavailable as error:
                log.warning("%s is left out: %s", task, error)
        if not names:
            raise DataUnavailable(f"eval={self.name}: data_dir={self.data_dir} has none of {', '.join(self._asked)}")
        return names


@dataclass(frozen=True)
class _OneTask:
    """One task of a suite, asked by itself; its description is what the suite's says of it."""

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
        rows = [
            {"suite": self.suite.name, "task": self.name, "id": item_id(sample["doc_id"], sample["doc"])}
            | _answer(self.task, sample)
            for sample in results["samples"][self.name]
        ]
        items = item_table(rows, EXTRA_COLUMNS)
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
        if own is None or (own != 0 and asked is not None):  # a task's own 0 is never overruled
            self.task.set_config("num_fewshot", asked or 0)
        self.task.set_fewshot_seed(FEWSHOT_SEED)
        self.task._aggregation_list = {
            name: _without_overflow(aggregate) for name, aggregate in self.task._aggregation_list.items()
        }
        found = evaluate(
            lm=ScorerLM(scorer) if self.suite.scoring == "fast" else stock_lm(scorer),
            task_dict={"tasks": {self.name: self.task}},
            limit=self.suite.limit,
            bootstrap_iters=0,
            cache_requests=False,  # lm-eval's request cache does not know the model
            log_samples=True,
        )
        assert found is not None  # it is, on every rank but the first of a distributed run
        return found

    def _metrics(self, found: Mapping[str, Any], items: pl.DataFrame) -> dict[str, float]:
        by = "gold_index" if items["gold_index"].null_count() == 0 else "gold"
        metrics = {f"{self.name}.majority": int(items[by].value_counts()["count"].max()) / items.height}  # type: ignore[arg-type]
        for key, value in found.items():
            metric, comma, _ = key.partition(",")
            if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
                metrics[f"{self.name}.{metric}"] = float(value)
        return metrics


def _without_overflow(aggregate: Callable[[Any], float]) -> Callable[[Any], float]:
    """A metric of lm-eval that is infinite where it is too large for a float."""

    def bounded(values: Any) -> float:
        try:
            return aggregate(values)
        except OverflowError:
            return math.inf

    return bounded


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
        "prediction_log_prob": scores[best],
        "margin": scores[gold] - max(wrong) if all(map(math.isfinite, scores)) else math.nan,
        "rank": 1 + sum(score > scores[gold] for score in wrong),
        "choices": len(choices),
    }
