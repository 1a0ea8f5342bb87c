"""PopQA: questions about subjects of known popularity, answered in the model's own words and by ranking candidates.

Mallen et al. 2023, "When Not to Trust Language Models: Investigating Effectiveness of Parametric and Non-Parametric
Memories". As in the paper, an answer is right if it contains an accepted one; exact match and rank are stricter.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.bear import ranked
from knowledge_compression.evaluation.calibration import sampled
from knowledge_compression.evaluation.open_questions import (
    OpenQuestion,
    OpenSuite,
    check_family,
    contains,
    log_probs,
    matches,
    said,
)
from knowledge_compression.evaluation.suite import Evaluation, accuracy_metrics, item_table
from knowledge_compression.heavy import pl
from knowledge_compression.reading import parsed

if TYPE_CHECKING:
    from knowledge_compression.evaluation.scoring import Scorer

BINS = ("tail", "middle", "head")


@dataclass(frozen=True)
class PopQA(OpenSuite):
    """PopQA as a suite, for decoders and encoder-decoders.

    Attributes:
        candidates: number of answers among which the right one is ranked: itself and others of its relation, drawn at
            random and the same for every model; None takes all of them, 0 disables the ranking.
        data_dir, prompt, most, limit, hub_id: see :class:`OpenSuite`.
    """

    SUITE = "popqa"
    READING = "popqa 1"
    NAMES = ("popqa/test.jsonl", "popqa/popQA.tsv", "popqa/test.tsv", "popqa/test.csv")
    COLUMNS = ("question", "prop", "obj", "s_pop", "possible_answers")
    candidates: int | None = 20
    hub_id: str = "akariasai/PopQA"

    def __post_init__(self) -> None:
        """Refuse options that leave nothing to ask."""
        super().__post_init__()
        if self.candidates is not None and (self.candidates < 0 or self.candidates == 1):
            raise BadInput(
                f"popqa.candidates={self.candidates} leaves no choice; set a number from 2 on, null for "
                "all, or 0 for no ranking"
            )

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Ask every question.

        Returns:
            Items with ``popularity`` (page views of the subject in a month), ``bin`` (its third of the data set: tail,
            middle, head), ``exact`` and ``rank`` beside ``correct``, which is PopQA's own criterion: the model's text
            contains an accepted answer. ``log_prob``, ``margin`` and ``choices`` come from the ranking.
            Metrics: ``accuracy``, ``exact_match``, ``ranked``, each also by bin (``tail.accuracy``).
        """
        check_family("popqa", scorer)
        rows, questions = self._rows, self._questions
        texts = said(scorer, questions, self.most)
        scores = log_probs(scorer, questions)
        table = []
        for question, text, of in zip(questions, texts, scores, strict=True):
            row = rows[question.number]
            asked = {"suite": "popqa", "task": row["prop"], "id": question.id, "prompt": question.prompt}
            ranks = ranked(question.answers[0], question.choices, np.array(of)) if len(of) > 1 else {}
            table.append(
                asked
                | {"gold": question.answers[0], "popularity": row["s_pop"], "bin": row["bin"]}
                | {"exact": matches(text, question.answers)}
                | {name: ranks.get(name) for name in ("log_prob", "margin", "rank", "choices")}
                | {"prediction": text, "correct": contains(text, question.answers)}
            )
        extra = {"popularity": pl.Int64(), "bin": pl.String(), "exact": pl.Boolean()}
        items = item_table(table, extra)
        described: dict[str, Any] = {
            "facts": self.fingerprint(),
            "prompt": self.prompt,
            "most": self.most,
            "candidates": self.candidates,
            "limit": self.limit,
            "duplicates_dropped": self._read[1],
        }
        return Evaluation(accuracy_metrics(items) | popularity_metrics(items), items, described)

    @cached_property
    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """The rows, each question once, with its third by popularity; and the number of repeated rows."""
        every = [(str(row.get("id") or row["question"]), _row(where, row)) for where, row in self._source.rows()]
        rows = list(dict(reversed(every)).values())[::-1]
        ends = np.quantile([row["s_pop"] for row in rows], (1 / 3, 2 / 3))
        binned = [row | {"bin": BINS[int(np.searchsorted(ends, row["s_pop"], side="left"))]} for row in rows]
        return binned, len(every) - len(rows)

    @property
    def _rows(self) -> list[dict[str, Any]]:
        return self._read[0]

    @cached_property
    def _questions(self) -> list[OpenQuestion]:
        objects: dict[str, list[str]] = {}
        for row in self._rows:
            objects.setdefault(row["prop"], []).append(row["obj"])
        others = {prop: sorted(set(of)) for prop, of in objects.items()}
        return [
            OpenQuestion(
                number,
                self.prompt.replace("{question}", row["question"]),
                list(dict.fromkeys([row["obj"], *row["answers"]])),
                self._choices(number, row, others[row["prop"]]),
            )
            for number, row in sampled(list(enumerate(self._rows)), self.limit)
        ]

    def _choices(self, number: int, row: dict[str, Any], objects: Sequence[str]) -> list[str]:
        """The right answer and others that are not accepted for this question."""
        if self.candidates == 0:
            return []
        wrong = [one for one in objects if one != row["obj"] and not matches(one, row["answers"])]
        if self.candidates is not None and len(wrong) >= self.candidates:
            wrong = sorted(random.Random(number).sample(wrong, self.candidates - 1))
        return [row["obj"], *wrong]


def popularity_metrics(items: pl.DataFrame) -> dict[str, float]:
    """Exact match and share ranked first, over all items and with accuracy by popularity."""
    first = pl.col("rank") == 1
    kinds = {"accuracy": pl.col("correct"), "exact_match": pl.col("exact"), "ranked": first}
    metrics: dict[str, float] = {}
    for name, of in (("", items), *((f"{bin_}.", items.filter(pl.col("bin") == bin_)) for bin_ in BINS)):
        for kind, expression in kinds.items():
            value = of.select(expression.mean()).item()
            if value is not None:
                metrics[f"{name}{kind}"] = float(value)
    return metrics


def _row(where: str, row: dict[str, Any]) -> dict[str, Any]:
    answers = row["possible_answers"]
    if isinstance(answers, str):  # as in the published table
        answers = parsed(answers, f"{where} possible_answers", "a list of texts")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise BadInput(f"{where}: possible_answers is not a list of texts")
    try:
        popularity = int(row["s_pop"])
        if abs(popularity) >= 2**63:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise BadInput(f"{where}: s_pop='{row['s_pop']}' is not a whole number") from None
    texts = {name: str(row[name]) for name in ("question", "prop", "obj")}
    return texts | {"s_pop": popularity, "answers": answers}
