"""The depth at which a model has an answer: the logit lens over the clozes of another suite.

The hidden state at the blank, before the first block and after each, is passed through what comes after the last block
(norm and head), as if the remaining blocks did not exist (nostalgebraist, "interpreting GPT: the logit lens", 2020).
Compared with the dense model's, it distinguishes a fact that a compressed model still finds and then loses in its last
layers from one that it never finds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.atlas import Atlas
from knowledge_compression.evaluation.calibration import GroupMean, Questions, group_sizes
from knowledge_compression.evaluation.cloze import Candidates, Cloze, reader_of
from knowledge_compression.evaluation.lama import Lama
from knowledge_compression.evaluation.scoring import Blank
from knowledge_compression.evaluation.suite import Evaluation, item_table
from knowledge_compression.evaluation.world_facts import WorldProbes
from knowledge_compression.heavy import pl, torch
from knowledge_compression.identity import PLACE
from knowledge_compression.models import Model
from knowledge_compression.progress import counted

if TYPE_CHECKING:
    from torch import Tensor

    from knowledge_compression.evaluation.scoring import Scorer


class ClozeSuite(Protocol):
    """A suite whose questions are clozes."""

    def questions(self, model: Model) -> Questions:
        """The questions for ``model``."""
        ...


SUITES: Mapping[str, Callable[[LogitLens], ClozeSuite]] = {
    "atlas": lambda lens: Atlas(limit=lens.limit),
    "world": lambda lens: WorldProbes(),
    "lama": lambda lens: Lama(data_dir=lens.data_dir, limit=lens.limit),
}


@dataclass(frozen=True)
class LogitLens:
    """Rank and log-probability of the right answer's first token at every depth.

    Answers are ranked by their first tokens, among the distinct first tokens of their relation's answers, so that every
    model is asked the same question at every depth.

    Attributes:
        of: the suite whose questions are asked: ``atlas``, ``world`` or ``lama``, with its own settings; its items in
            the same run are the same facts.
        calibrate: subtract each candidate's mean log-probability over the relation's prompts in the same wording, at
            the same depth. None follows the suite's own default (the atlas calibrates, LAMA and the world do not), so
            that the ranks at the last depth agree with the suite's.
        limit: maximum number of questions (for the atlas and LAMA), see ``calibration.sampled``.
        data_dir: local files of LAMA instead of the hub.
    """

    scores: ClassVar[bool] = False
    of: str = "atlas"
    calibrate: bool | None = None
    limit: int | None = None
    data_dir: str | None = field(default=None, metadata=PLACE)

    def __post_init__(self) -> None:
        """Refuse suites without clozes."""
        if self.of not in SUITES:
            raise BadInput(f"eval.lens.of={self.of} does not exist; choose one of {', '.join(SUITES)}")
        self._suite()

    def fingerprint(self) -> str | None:
        """The fingerprint of the suite whose questions are asked."""
        suite = self._suite()
        return suite.fingerprint() if isinstance(suite, Atlas | Lama) else None

    def evaluate(self, scorer: Scorer) -> Evaluation:
        """Rank the answers of every question at every depth.

        Returns:
            Items with the ids of the suite that is asked, ``rank``, ``log_prob`` and ``choices`` at the last depth, and
            the lists ``depth_rank`` and ``depth_log_prob`` over all depths, the first before the first block. They have
            no ``correct``, which the suite itself reports. Metrics ``first.0`` ...: share ranked first, by depth.

        Raises:
            BadInput: no question ends in a blank that a single token can fill.
        """
        suite = self._suite()
        calibrate = getattr(suite, "calibrate", False) if self.calibrate is None else self.calibrate
        questions = suite.questions(scorer.model)
        clozes = questions.calibrating() if calibrate else list(questions.asked)
        reader = reader_of(scorer)
        candidates = Candidates(reader, questions.answers)
        blanks = reader.blanks(clozes)
        fits = [
            blank is not None and bool(candidates.tokens(cloze)[candidates.answers[cloze.task].index(cloze.gold)])
            for cloze, blank in zip(clozes, blanks, strict=True)
        ]
        sizes = group_sizes(questions, clozes, fits) if calibrate else {}
        by_task: dict[str, list[tuple[Cloze, Blank]]] = defaultdict(list)
        for cloze, blank, fit in zip(clozes, blanks, fits, strict=True):
            if blank is not None and fit:
                by_task[cloze.task].append((cloze, blank))
        wanted = {cloze.id for cloze in questions.asked}
        rows = []
        with counted(sum(fits), "lens") as advance:
            for task in by_task.values():
                rows += self._look(scorer, task, candidates, sizes, wanted)
                advance(len(task))
        asked = len(rows)
        if not asked:
            name = scorer.model.name
            raise BadInput(f"eval.lens: none of the {len(wanted)} questions of {self.of} can be asked of {name}")
        items = item_table(rows, {"depth_rank": pl.List(pl.Int32()), "depth_log_prob": pl.List(pl.Float32())})
        first = torch.tensor(items["depth_rank"].to_list()) == 1
        metrics = {f"first.{depth}": float(share) for depth, share in enumerate(first.double().mean(0))}
        description = {"of": self.of, "calibrate": calibrate, "asked": asked, "left_out": len(wanted) - asked}
        return Evaluation(metrics, items, description)

    def _suite(self) -> ClozeSuite:
        return SUITES[self.of](self)

    def _look(
        self,
        scorer: Scorer,
        read: Sequence[tuple[Cloze, Blank]],
        candidates: Candidates,
        sizes: Mapping[tuple[str, str], int],
        wanted: Collection[str],
    ) -> list[dict[str, Any]]:
        """The item rows for one task's questions.

        Args:
            scorer: reads the blanks.
            read: the task's clozes, including those that only calibrate.
            candidates: the answers.
            sizes: number of prompts of each relation and wording; empty if not calibrated.
            wanted: ids of the clozes to report.
        """
        firsts = [_first_tokens(candidates, cloze) for cloze, _ in read]
        scores: list[Tensor] = [torch.empty(0)] * len(read)  # [depths, distinct first tokens] each
        for batch, log_probs in scorer.distributions_by_depth([blank for _, blank in read]):
            for i, states in zip(batch, log_probs, strict=True):
                scores[i] = states[:, firsts[i][0]].cpu()
        alike: dict[tuple[str, bool], list[Tensor]] = defaultdict(list)  # first tokens depend on the text before them
        for (cloze, _), row in zip(read, scores, strict=True):
            alike[cloze.wording, cloze.glued].append(row)
        wordings = Counter(cloze.wording for cloze, _ in read)
        rows = []
        for (cloze, _), (tokens, gold), raw in zip(read, firsts, scores, strict=True):
            of = alike[cloze.wording, cloze.glued]
            if cloze.id not in wanted or (sizes and len(of) == 1):  # a single prompt cannot be calibrated
                continue
            calibrated = raw
            if sizes:
                size = round(sizes[cloze.task, cloze.wording] * len(of) / wordings[cloze.wording])
                calibrated = raw - GroupMean(torch.stack(of).sum(0), len(of), size).of(raw)
            ranks = (calibrated >= calibrated[:, gold : gold + 1]).sum(1)  # a tie counts as lost
            rows.append(
                {"suite": "lens", "task": cloze.task, "id": cloze.id, "prompt": cloze.sentence, "gold": cloze.gold}
                | {"rank": int(ranks[-1]), "log_prob": float(raw[-1, gold]), "choices": len(tokens)}
                | {"depth_rank": ranks.tolist(), "depth_log_prob": raw[:, gold].tolist()}
            )
        return rows


def _first_tokens(candidates: Candidates, cloze: Cloze) -> tuple[list[int], int]:
    """The distinct first tokens of a cloze's candidates, and the index of the right answer's among them."""
    tokens = candidates.tokens(cloze)
    distinct = sorted({ids[0] for ids in tokens if ids})
    return distinct, distinct.index(tokens[candidates.answers[cloze.task].index(cloze.gold)][0])
