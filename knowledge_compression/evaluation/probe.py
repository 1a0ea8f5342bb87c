"""Asking clozes and ranking their answers: the common part of LAMA and the atlas."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.calibration import (
    Group,
    GroupMean,
    Questions,
    group_means,
    group_of,
    group_sizes,
    without_company,
)
from knowledge_compression.evaluation.cloze import (
    Candidates,
    Cloze,
    Reader,
    candidate_scores,
    distributions,
    reader_of,
)
from knowledge_compression.evaluation.confidence import columns, confidence
from knowledge_compression.evaluation.scoring import Blank, likeliest
from knowledge_compression.evaluation.suite import Evaluation, accuracy_metrics, item_table
from knowledge_compression.heavy import pl, torch
from knowledge_compression.models import Model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from knowledge_compression.evaluation.scoring import Scorer

CANDIDATES = ("full", "common", "typed")
EXTRA_COLUMNS = ("subject", "fact", "wording")  # texts


@dataclass(frozen=True)
class Ranking:
    """The rank of one cloze's gold answer.

    Attributes:
        log_prob: its natural log-probability before calibration; None if the model cannot produce it.
        margin: its score minus the best wrong answer's (after calibration); None if there is no wrong answer.
        rank: 1 + the number of wrong answers whose score is not lower, so a tie counts as wrong.
        choices: number of answers among which it was ranked.
        prediction: the gold answer if it ranks first, otherwise the best wrong answer.
        prediction_log_prob: the prediction's natural log-probability before calibration.
        sure: the columns of :mod:`.confidence`; none if it was ranked in a vocabulary.
    """

    log_prob: float | None
    margin: float | None
    rank: int | None
    choices: int
    prediction: str
    prediction_log_prob: float
    sure: dict[str, Any] = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        """Whether the gold answer ranks first."""
        return self.rank == 1


@dataclass(frozen=True)
class Probe:
    """The settings for asking clozes.

    Attributes:
        candidates: ``full`` (the model's vocabulary: every id for which its tokenizer has a token, without ids that
            only pad the embeddings), ``common`` (a list of words) or ``typed`` (the relation's own objects, including
            those of several tokens).
        calibrate: subtract each candidate's mean log-probability over the prompts of the relation in the same wording,
            so that answers likely after any subject have no advantage (contextual calibration as in Zhao et al. 2021,
            with the other prompts in place of content-free ones). The only prompt of a relation and wording would be
            calibrated against itself, making all answers tie; it is left out.
        top_k: the k of the top-k metrics.
        lower_case: whether answers are compared after lower-casing (the first paper).
        keep_long: if only single tokens are ranked, whether objects of several tokens count as wrong (the first paper);
            otherwise they are left out and counted.
        max_tokens: sentences are truncated to this length; None uses the model's own limit.
    """

    candidates: str = "typed"
    calibrate: bool = False
    top_k: Sequence[int] = (10,)
    lower_case: bool = False
    keep_long: bool = False
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse unknown candidates and invalid top-k."""
        if self.candidates not in CANDIDATES:
            raise BadInput(f"candidates='{self.candidates}' does not exist; choose one of {', '.join(CANDIDATES)}")
        if wrong := [k for k in self.top_k if not isinstance(k, int) or k < 1]:
            raise BadInput(f"top_k={wrong[0]} is not a rank; choose whole numbers from 1 on, e.g. top_k=[5,10]")

    def ask(self, suite: str, scorer: Scorer, questions: Questions, common: Sequence[str] = ()) -> Evaluation:
        """Ask every cloze.

        Args:
            suite: the suite's name in the item table.
            scorer: scores with the model, of any family.
            questions: the clozes, and the answers of each task, for ``typed``.
            common: the list of words, for ``common``.

        Returns:
            One item per cloze that could be asked; ``description["left_out"]`` counts the others by reason and task,
            ``description["objects_of_several_tokens"]`` counts those by task, left out or not.

        Raises:
            BadInput: none of them can be asked of this model.
        """
        reader, model = reader_of(scorer, self.max_tokens), scorer.model
        clozes = questions.calibrating() if self.calibrate else list(questions.asked)
        blanks = reader.blanks(clozes)
        gold = _gold_tokens(reader, clozes)
        common_ids = _single_tokens(reader, common) if self.candidates == "common" else None
        reasons = [self._cannot(reader, *one, common_ids) for one in zip(clozes, blanks, gold, strict=True)]
        if self.calibrate:
            reasons = without_company(clozes, reasons)
        count = len(questions.asked)
        kept = [i for i, reason in enumerate(reasons) if reason is None]
        asked = [clozes[i] for i in kept if i < count]
        if not asked:
            why = ", ".join(f"{n} {reason}" for reason, n in Counter(filter(None, reasons[:count])).items())
            raise BadInput(f"eval={suite}: none of the {count} questions can be asked of {model.name} ({why})")
        read, of_read = [clozes[i] for i in kept], [blanks[i] for i in kept]  # the asked clozes come first
        sizes = group_sizes(questions, clozes, [reason is None for reason in reasons])
        if self.candidates == "typed":
            candidates = Candidates(reader, questions.answers)
            rankings = self._rank_typed(reader, read, of_read, candidates, count=len(asked), sizes=sizes)
        else:
            singles = _readings(reader, asked) if self.lower_case else [[*gold[i]] for i in kept if i < count]
            there = [blank for blank in of_read if blank is not None]
            ranked = _ids_of_tokens(model) if common_ids is None else common_ids
            with torch.inference_mode():
                rankings = self._rank_vocabulary(reader, read, there, singles, allowed=ranked, sizes=sizes)
        items = item_table(
            [_row(suite, cloze, ranking) for cloze, ranking in zip(asked, rankings, strict=True)],
            dict.fromkeys(EXTRA_COLUMNS, pl.String()) | columns(),
        )
        left_out: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for cloze, reason in zip(clozes[:count], reasons, strict=False):
            if reason:
                left_out[reason][cloze.task] += 1
        long = Counter(cloze.task for cloze, ids in zip(clozes[:count], gold, strict=False) if len(ids) > 1)
        return Evaluation(
            cloze_metrics(items, self.top_k),
            items,
            {
                "candidates": self.candidates,
                "calibrate": self.calibrate,
                "asked": len(asked),
                **({"calibrated_on": len(read)} if self.calibrate else {}),
                "left_out": {reason: dict(sorted(tasks.items())) for reason, tasks in sorted(left_out.items())},
                "objects_of_several_tokens": dict(sorted(long.items())),
            },
        )

    def _cannot(
        self, reader: Reader, cloze: Cloze, blank: Blank | None, gold: tuple[int, ...], allowed: Tensor | None
    ) -> str | None:
        """Why a cloze cannot be asked; None if it can."""
        single = self.candidates != "typed"
        reasons = {
            "mask_cut_off": blank is None and reader.needs_blank,
            "object_not_last": blank is None and single,
            "object_unknown_to_tokenizer": not gold and not self.keep_long,
            "object_of_several_tokens": len(gold) > 1 and single and not self.keep_long,
            "object_not_in_common_vocabulary": allowed is not None and bool(gold) and gold[0] not in allowed,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _rank_typed(
        self,
        reader: Reader,
        clozes: Sequence[Cloze],
        blanks: Sequence[Blank | None],
        candidates: Candidates,
        *,
        count: int,
        sizes: Mapping[Group, int],
    ) -> list[Ranking]:
        """Rank the first ``count`` clozes among their relation's answers; the others only calibrate."""
        scores = candidate_scores(reader, clozes, blanks, candidates)
        means = group_means(clozes, scores, sizes) if self.calibrate else {}
        return [
            rank_among(
                cloze.gold,
                candidates.answers[cloze.task],
                candidates.tokens(cloze),
                raw,
                means[group_of(cloze)].of(raw) if self.calibrate else None,
            )
            for cloze, raw in zip(clozes[:count], scores, strict=False)
        ]

    def _rank_vocabulary(
        self,
        reader: Reader,
        clozes: Sequence[Cloze],
        blanks: Sequence[Blank],
        gold: Sequence[Sequence[int]],
        *,
        allowed: Tensor | None,
        sizes: Mapping[Group, int],
    ) -> list[Ranking]:
        """Rank among all tokens, or the allowed ones; ``gold`` holds the ids of the right tokens of each cloze.

        Clozes beyond the length of ``gold`` are not ranked; they only calibrate.
        """
        scorer = reader.scorer
        means = _vocabulary_means(scorer, blanks, clozes, sizes) if self.calibrate else {}
        count = len(gold)
        rankings: list[Ranking | None] = [None] * count
        said_before: dict[int, str] = {}
        for batch, log_probs in distributions(scorer, blanks[:count]):
            right, real = _padded([gold[b] for b in batch], log_probs.device)
            said = log_probs.gather(1, right).masked_fill(~real, -torch.inf).amax(1)
            scores = log_probs.clone() if means else log_probs
            for row, b in enumerate(batch if means else ()):
                scores[row] -= means[group_of(clozes[b])].of(log_probs[row])
            gold_scores = scores.gather(1, right).masked_fill(~real, -torch.inf).amax(1)
            if allowed is not None:
                outside = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
                outside[allowed.to(scores.device)] = False
                scores = scores.masked_fill(outside, -torch.inf)
            rows, which = real.nonzero(as_tuple=True)
            scores[rows, right[rows, which]] = -torch.inf  # the remaining tokens are wrong
            place = likeliest(scores)
            best = scores.gather(1, place[:, None])[:, 0]
            best_wrong = log_probs.gather(1, place[:, None])[:, 0]
            beaten = torch.lt(scores, gold_scores[:, None], out=torch.empty_like(scores)).sum(
                dim=1
            )  # sums of bool are slow
            ahead = scores.shape[1] - beaten.long()
            tokens = place.tolist()
            if new := list(set(tokens) - said_before.keys()):
                said_before |= zip(new, reader.tokenizer.batch_decode([[token] for token in new]), strict=True)
            words = [said_before[token] for token in tokens]
            choices = scores.shape[1] if allowed is None else len(allowed)
            numbers = [column.tolist() for column in (said, gold_scores - best, ahead, best_wrong)]
            for b, word, log_prob, margin, ahead_of_it, of_word in zip(batch, words, *numbers, strict=True):
                if not gold[b]:  # the model has no token for the gold answer
                    rankings[b] = Ranking(None, None, None, choices, self._shown(word), of_word)
                    continue
                rank = 1 + ahead_of_it
                prediction, its = (clozes[b].gold, log_prob) if rank == 1 else (word, of_word)
                wrong = choices - len(gold[b])
                rankings[b] = Ranking(
                    log_prob, margin if wrong else None, rank, wrong + 1, self._shown(prediction), its
                )
        return [ranking for ranking in rankings if ranking is not None]

    def _shown(self, word: str) -> str:
        return word.strip().lower() if self.lower_case else word.strip()


def cloze_metrics(items: pl.DataFrame, top_k: Iterable[int]) -> dict[str, float]:
    """The accuracy of every suite; top-k and mean reciprocal rank, micro and macro over relations; the chance level.

    An answer without a rank (the model has no token for it) counts as wrong.
    """
    found = {"mrr": (1 / pl.col("rank")).fill_null(0.0)} | {
        f"top{k}": (pl.col("rank") <= k).fill_null(value=False).cast(pl.Float64) for k in top_k
    }
    columns = items.select("task", chance=1 / pl.col("choices"), **found)
    by_task = columns.group_by("task").mean().sort("task")  # in a fixed order, so that sums round the same way
    metrics = accuracy_metrics(items)
    for name in ("chance", *found):
        metrics[name] = float(columns[name].mean() or 0.0)  # type: ignore[arg-type]
        metrics[f"{name}_macro"] = float(by_task[name].mean() or 0.0)  # type: ignore[arg-type]
    return metrics


def _row(suite: str, cloze: Cloze, ranking: Ranking) -> dict[str, Any]:
    asked = {"suite": suite, "task": cloze.task, "id": cloze.id, "prompt": cloze.sentence, "gold": cloze.gold}
    about = {"subject": cloze.subject, "fact": cloze.fact, "wording": cloze.wording}
    return asked | about | {"correct": ranking.correct} | vars(ranking) | ranking.sure


def rank_among(
    gold: str, names: Sequence[str], tokens: Sequence[Sequence[int]], raw: Tensor, mean: Tensor | None = None
) -> Ranking:
    """The rank of the gold answer among candidates.

    Args:
        gold: the right answer, one of ``names``.
        names, tokens: the candidates and their token ids; a candidate without tokens is skipped, and one with the gold
            answer's text is not counted as wrong.
        raw: log-probability of each, float64 ``[candidates]``.
        mean: subtracted by calibration, ``[candidates]``; None subtracts nothing.

    Raises:
        BadInput: the right answer is not among the candidates.
    """
    if gold not in names:
        raise BadInput(f"the right answer '{gold}' is not among the {len(names)} candidates; add it to them")
    place = names.index(gold)
    calibrated = raw if mean is None else raw - mean
    known = torch.tensor([len(ids) > 0 for ids in tokens])
    wrong = torch.tensor([ids != tokens[place] for ids in tokens]) & known
    best = calibrated.masked_fill(~wrong, -torch.inf)
    rank = 1 + int((wrong & ~(calibrated < calibrated[place])).sum())
    said = place if rank == 1 else int(best.argmax())
    margin = float(calibrated[place] - best.max()) if wrong.any() else None
    among = wrong.clone()
    among[place] = True
    sure = confidence(calibrated[among].tolist(), int(among[:place].sum()))
    return Ranking(float(raw[place]), margin, rank, int(among.sum()), names[said], float(raw[said]), sure)


def _vocabulary_means(
    scorer: Scorer, blanks: Sequence[Blank], clozes: Sequence[Cloze], sizes: Mapping[Group, int]
) -> dict[Group, GroupMean]:
    """Mean log-probability of each token over each group's prompts, float32 ``[vocabulary]``."""
    groups = {group: n for n, group in enumerate(sizes)}
    of = torch.tensor([groups[group_of(cloze)] for cloze in clozes], dtype=torch.long)
    sums: Tensor | None = None
    for batch, log_probs in distributions(scorer, blanks):
        if sums is None:
            sums = torch.zeros(len(groups), log_probs.shape[1], device=log_probs.device)
        sums.index_add_(0, of[batch].to(log_probs.device), log_probs)
    assert sums is not None
    counts = torch.bincount(of, minlength=len(groups)).tolist()
    return {group: GroupMean(sums[n], counts[n], sizes[group]) for group, n in groups.items()}


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad token ids to int64 ``[rows, longest]``, at least one wide; also return which entries are real."""
    width = max(1, *map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    real = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=device)
    return ids, real


def _gold_tokens(reader: Reader, clozes: Sequence[Cloze]) -> list[tuple[int, ...]]:
    tokens: dict[tuple[str, bool], tuple[int, ...]] = {}
    for glued in (False, True):
        answers = sorted({cloze.gold for cloze in clozes if cloze.glued is glued})
        ids = reader.answer_ids(answers, glued=glued)
        tokens |= {(answer, glued): one for answer, one in zip(answers, ids, strict=True)}
    return [tokens[cloze.gold, cloze.glued] for cloze in clozes]


def _single_tokens(reader: Reader, words: Sequence[str]) -> Tensor:
    return torch.tensor(sorted({ids[0] for ids in reader.answer_ids(words) if len(ids) == 1}), dtype=torch.long)


def _ids_of_tokens(model: Model) -> Tensor | None:
    """The ids that have a token, int64 ``[tokens]``; None if all rows of the embeddings do."""
    rows = model.text_config.vocab_size
    ids = sorted(i for i in set(model.tokenizer.get_vocab().values()) if i < rows)
    return torch.tensor(ids, dtype=torch.long) if len(ids) < rows else None


def _readings(reader: Reader, clozes: Sequence[Cloze]) -> list[list[int]]:
    """The tokens whose lower-cased text equals the lower-cased gold answer."""
    tokens = _lower_cased(reader.tokenizer)
    return [tokens.get(cloze.gold.strip().lower(), []) for cloze in clozes]


@lru_cache(
    maxsize=4
)  # many suites and runs use a tokenizer, and reading its whole vocabulary takes a third of a second
def _lower_cased(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, list[int]]:
    """The tokens of a vocabulary by their lower-cased text."""
    tokens: defaultdict[str, list[int]] = defaultdict(list)
    for token, word in enumerate(tokenizer.batch_decode([[token] for token in range(len(tokenizer))])):
        tokens[word.strip().lower()].append(token)
    return tokens
