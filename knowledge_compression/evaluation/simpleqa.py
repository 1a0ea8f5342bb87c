"""SimpleQA: short questions with one indisputable answer, which a model may decline to answer.

Wei et al. 2024, "Measuring short-form factuality in large language models". There a language model grades the answers.
Here a rule does, which is the same for every model and needs no network: an answer is correct if it contains the right
one, *not attempted* if it is empty or says that the model does not know, and incorrect otherwise. Grades are therefore
comparable between models here, but not with published grades.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from knowledge_compression.evaluation.calibration import sampled
from knowledge_compression.evaluation.open_questions import (
    OpenQuestion,
    OpenSuite,
    check_family,
    contains,
    normal,
    said,
)
from knowledge_compression.evaluation.suite import Evaluation, item_table
from knowledge_compression.heavy import pl

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring import Scorer

CORRECT, INCORRECT, NOT_ATTEMPTED = "correct", "incorrect", "not attempted"
# The words of a model that declines, normalized (lower case, without punctuation and articles).
_DECLINES = re.compile(
    r"\b(i (do not|dont|cannot|cant|am not sure|am unable|have no)|im (not sure|unable|sorry)|i am sorry"
    r"|(is|are) (not known|unknown|unclear)|unknown|no (information|idea)|not (sure|certain|available|publicly)"
    r"|sorry|cannot (answer|determine|provide|say))\b"
)


@dataclass(frozen=True)
class SimpleQA(OpenSuite):
    """SimpleQA as a suite, for decoders and encoder-decoders; its settings are those of :class:`OpenSuite`."""

    SUITE = "simpleqa"
    READING = "simpleqa 1"
    NAMES = ("simpleqa/simple_qa_test_set.csv", "simpleqa/test.csv", "simpleqa/test.jsonl")
    COLUMNS = ("problem", "answer")
    most: int = 32
    hub_id: str = "basicv8vc/SimpleQA"

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask every question.

        Returns:
            Items with a ``grade`` (correct, incorrect, not attempted) beside ``correct``. Metrics: ``accuracy``, which
            is of all items, ``incorrect``, ``not_attempted``, ``correct_given_attempted``, and ``f_score``, the
            harmonic mean of the first and the last (section 3 of the paper).
        """
        check_family("simpleqa", scorer)
        questions, _ = self._questions
        rows = [
            {"suite": "simpleqa", "task": "simpleqa", "id": one.id, "prompt": one.prompt, "gold": one.answers[0]}
            | {"prediction": text, "grade": graded(text, one.answers[0])}
            for one, text in zip(questions, said(scorer, questions, self.most), strict=True)
        ]
        items = item_table([row | {"correct": row["grade"] == CORRECT} for row in rows], {"grade": pl.String()})
        described = {
            "facts": self.fingerprint(),
            "graded": "by rule",
            "prompt": self.prompt,
            "most": self.most,
            "limit": self.limit,
            "duplicates_dropped": self._questions[1],
        }
        return Evaluation(grade_metrics(items), items, described)

    @cached_property
    def _questions(self) -> tuple[list[OpenQuestion], int]:
        """The questions that are asked, and how many rows said one again."""
        rows = [row for _, row in self._source.rows()]
        distinct = {str(row["problem"]): str(row["answer"]) for row in reversed(rows)}
        every = [
            OpenQuestion(number, self.prompt.replace("{question}", problem), [distinct[problem]])
            for number, problem in enumerate(dict.fromkeys(str(row["problem"]) for row in rows))
        ]
        return sampled(every, self.limit), len(rows) - len(every)


def graded(text: str, answer: str) -> str:
    """The grade of an answer, by the rule of this module."""
    if contains(text, [answer]):
        return CORRECT
    return NOT_ATTEMPTED if not normal(text) or _DECLINES.search(normal(text)) else INCORRECT


def grade_metrics(items: pl.DataFrame) -> dict[str, float]:
    """Shares of the grades, and the F-score."""
    total = max(items.height, 1)
    right, wrong, none = (int((items["grade"] == grade).sum()) for grade in (CORRECT, INCORRECT, NOT_ATTEMPTED))
    metrics = {"accuracy": right / total, "incorrect": wrong / total, "not_attempted": none / total}
    metrics |= {"items": float(items.height)}
    if right + wrong:
        given = right / (right + wrong)
        metrics["correct_given_attempted"] = given
        metrics["f_score"] = 2 * metrics["accuracy"] * given / (metrics["accuracy"] + given) if right else 0.0
    return metrics
