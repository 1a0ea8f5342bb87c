"""The clozes that a suite asks, and those that it reads only to calibrate by the mean over prompts.

An answer's calibrated score is its log-probability minus its mean over all prompts of the relation in the same wording.
A sample of the questions is calibrated like the whole: the prompts that are not asked are read as well.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.cloze import Cloze
from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Group = tuple[str, str]  # relation and wording
SAMPLING = b"sample 2"  # version of sampling and calibration; raised when results would change
ENOUGH = 128  # prompts of a group over which calibration averages if only a sample of its questions is asked


@dataclass(frozen=True)
class Questions:
    """The questions of a suite.

    Attributes:
        asked: the clozes that are asked.
        answers: the distinct answers of each task.
        every: all clozes of the suite if only a sample is asked; calibration reads them too, so that an answer is
            calibrated the same way whether its neighbours are asked or not. Empty if all are asked.
    """

    asked: Sequence[Cloze]
    answers: Mapping[str, Sequence[str]]
    every: Sequence[Cloze] = ()

    @classmethod
    def sample(cls, clozes: Sequence[Cloze], limit: int | None) -> Questions:
        """At most ``limit`` of the clozes; see :func:`sampled`."""
        return cls(sampled(clozes, limit), answers_by_task(clozes), clozes)

    def calibrating(self) -> list[Cloze]:
        """The clozes that are read to calibrate those asked: all of the same relation and wording.

        From a group of more than 128 that is not asked completely, a sample of 128 is read besides those asked.
        """
        asked = {cloze.id for cloze in self.asked}
        groups: defaultdict[Group, list[Cloze]] = defaultdict(list)
        for cloze in self.every:
            groups[group_of(cloze)].append(cloze)
        read = list(self.asked)
        for group in dict.fromkeys(map(group_of, self.asked)):
            read += [cloze for cloze in sampled(groups[group], ENOUGH) if cloze.id not in asked]
        return read


def sampled(clozes: Sequence[T], limit: int | None, seed: int = 0) -> list[T]:
    """At most ``limit`` clozes (or facts) from all parts of the list, in its order; the same ones for every model.

    The list is cut into as many stretches, and one cloze is drawn at random from each, so that no period in the list
    (its wordings alternate) matches that of the sample. The list is treated as a circle and its cuts are random too, so
    over all seeds every cloze is equally likely.

    Args:
        clozes: the clozes to choose from.
        limit: how many to take; None takes all.
        seed: of the random draw.

    Raises:
        BadInput: ``limit`` is below one.
    """
    if limit is not None and limit < 1:
        raise BadInput(f"limit={limit} leaves no questions; choose a number from 1 on, or null for all")
    count = len(clozes)
    if limit is None or limit >= count:
        return list(clozes)
    draw = random.Random(seed)
    start = draw.randrange(count)
    places = [start + draw.randrange(i * count // limit, (i + 1) * count // limit) for i in range(limit)]
    return [clozes[place] for place in sorted(place % count for place in places)]


def answers_by_task(clozes: Iterable[Cloze]) -> dict[str, list[str]]:
    """The distinct objects of each task, sorted."""
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for cloze in clozes:
        answers[cloze.task].add(cloze.gold)
    return {task: sorted(objects) for task, objects in answers.items()}


@dataclass
class GroupMean:
    """The mean over a group's prompts: those asked, and some others that were read.

    Attributes:
        total: sum of the scores over the prompts that were read, ``[candidates]``.
        read: number of prompts that were read.
        size: number of prompts in the group.
    """

    total: Tensor
    read: int
    size: int

    def of(self, own: Tensor) -> Tensor:
        """The mean for one prompt: its own score counts once, and the mean of the others read stands for all others."""
        if self.read == self.size:
            return self.total / self.size
        others = (self.total - own) / (self.read - 1)
        return own / self.size + others * (1 - 1 / self.size)


def group_means(
    clozes: Sequence[Cloze], scores: Sequence[Tensor], sizes: Mapping[Group, int]
) -> dict[Group, GroupMean]:
    """Mean log-probability of each candidate over the prompts of each relation and wording.

    Args:
        clozes: the clozes that were read.
        scores: the scores of each, ``[candidates of its task]``.
        sizes: number of prompts in each group, read or not.
    """
    rows: defaultdict[Group, list[Tensor]] = defaultdict(list)
    for cloze, row in zip(clozes, scores, strict=True):
        rows[group_of(cloze)].append(row)
    return {group: GroupMean(torch.stack(of).sum(0), len(of), sizes[group]) for group, of in rows.items()}


def group_of(cloze: Cloze) -> Group:
    """The relation and the wording of a cloze."""
    return cloze.task, cloze.wording


def without_company(clozes: Sequence[Cloze], reasons: Sequence[str | None]) -> list[str | None]:
    """The reasons to leave clozes out, including being the only one of its group that can be asked."""
    company = Counter(group_of(cloze) for cloze, reason in zip(clozes, reasons, strict=True) if reason is None)
    return [
        "no_other_prompt_to_calibrate_with" if reason is None and company[group_of(cloze)] == 1 else reason
        for cloze, reason in zip(clozes, reasons, strict=True)
    ]


def group_sizes(questions: Questions, read: Sequence[Cloze], askable: Sequence[bool]) -> dict[Group, int]:
    """Number of prompts of each group that can be asked; estimated for groups that were not read completely."""
    whole = Counter(map(group_of, questions.every or questions.asked))
    seen = Counter(map(group_of, read))
    fit = Counter(group_of(cloze) for cloze, fits in zip(read, askable, strict=True) if fits)
    return {group: max(n, round(whole[group] * n / seen[group])) for group, n in fit.items()}
