"""What a cloze suite asks of its clozes, and what the others are read for: calibration by the mean over prompts.

An answer's calibrated score is its log-probability less its mean over all prompts of the relation in the same wording.
A sample of the questions is calibrated as the whole would be: the prompts that are not asked are read all the same.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.cloze import Cloze

Group = tuple[str, str]  # a relation and a wording
SAMPLING = b"sample 2"  # how samples are drawn and calibrated; raised when they would be others
ENOUGH = 128  # prompts of a group that calibration averages over where only a sample of its questions is asked


@dataclass(frozen=True)
class Questions:
    """What a suite asks.

    Attributes:
        asked: the clozes that are asked.
        answers: the distinct answers of each task.
        every: all clozes of the suite, where only a sample of them is asked; calibration reads them too, so that an
            answer is calibrated alike whether its neighbours are asked or not. Empty where all are asked.
    """

    asked: Sequence[Cloze]
    answers: Mapping[str, Sequence[str]]
    every: Sequence[Cloze] = ()

    @classmethod
    def sample(cls, clozes: Sequence[Cloze], limit: int | None) -> Questions:
        """At most ``limit`` of the clozes, see :func:`sampled`."""
        return cls(sampled(clozes, limit), answers_by_task(clozes), clozes)

    def calibrating(self) -> list[Cloze]:
        """The clozes that are read to calibrate those asked: all of the same relation and wording.

        Of a group that is larger than 128 and not asked whole, a sample of 128 is read beside those asked.
        """
        asked = {cloze.id for cloze in self.asked}
        groups: defaultdict[Group, list[Cloze]] = defaultdict(list)
        for cloze in self.every:
            groups[group_of(cloze)].append(cloze)
        read = list(self.asked)
        for group in dict.fromkeys(map(group_of, self.asked)):
            read += [cloze for cloze in sampled(groups[group], ENOUGH) if cloze.id not in asked]
        return read


def sampled(clozes: Sequence[Cloze], limit: int | None, seed: int = 0) -> list[Cloze]:
    """At most ``limit`` clozes from all parts of the list, in its order; the same ones for every model.

    The list is cut into as many stretches, and one cloze is drawn from each, so that no rhythm of the list (its
    wordings take turns) meets that of the sample. The list is a circle whose cuts are drawn too: over all seeds every
    cloze is as likely as any.

    Args:
        clozes: what there is.
        limit: how many to take; None takes all.
        seed: of the draw.

    Raises:
        BadInput: ``limit`` is below one.
    """
    if limit is not None and limit < 1:
        raise BadInput(f"limit={limit} asks nothing; give a number from 1, or null for all")
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
    """The mean over a group's prompts: those asked, and some others that were read for it.

    Attributes:
        total: sum of the scores of the prompts that were read, ``[candidates]``.
        read: how many those are.
        size: prompts of the group.
    """

    total: Tensor
    read: int
    size: int

    def of(self, own: Tensor) -> Tensor:
        """The mean as one of the prompts sees it: itself for one, and the mean of the others read for all others."""
        if self.read == self.size:
            return self.total / self.size
        others = (self.total - own) / (self.read - 1)
        return own / self.size + others * (1 - 1 / self.size)


def group_means(
    clozes: Sequence[Cloze], scores: Sequence[Tensor], sizes: Mapping[Group, int]
) -> dict[Group, GroupMean]:
    """Mean log-probability of each candidate over the prompts of each relation and wording.

    Args:
        clozes: those that were read.
        scores: of each, ``[candidates of its task]``.
        sizes: how many prompts each group has, read or not.
    """
    rows: defaultdict[Group, list[Tensor]] = defaultdict(list)
    for cloze, row in zip(clozes, scores, strict=True):
        rows[group_of(cloze)].append(row)
    return {group: GroupMean(torch.stack(of).sum(0), len(of), sizes[group]) for group, of in rows.items()}


def group_of(cloze: Cloze) -> Group:
    """The relation and the wording of a cloze."""
    return cloze.task, cloze.wording


def without_company(clozes: Sequence[Cloze], reasons: Sequence[str | None]) -> list[str | None]:
    """The reasons, with one for clozes that are the only ones of their group that can be asked."""
    company = Counter(group_of(cloze) for cloze, reason in zip(clozes, reasons, strict=True) if reason is None)
    return [
        "no_other_prompt_to_calibrate_with" if reason is None and company[group_of(cloze)] == 1 else reason
        for cloze, reason in zip(clozes, reasons, strict=True)
    ]


def group_sizes(questions: Questions, read: Sequence[Cloze], askable: Sequence[bool]) -> dict[Group, int]:
    """Prompts of each group that can be asked; of one that was not read whole, told from the share of those read."""
    whole = Counter(map(group_of, questions.every or questions.asked))
    seen = Counter(map(group_of, read))
    fit = Counter(group_of(cloze) for cloze, fits in zip(read, askable, strict=True) if fits)
    return {group: max(n, round(whole[group] * n / seen[group])) for group, n in fit.items()}
