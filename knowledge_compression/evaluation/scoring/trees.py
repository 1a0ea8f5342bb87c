"""Token trees: beginnings that several texts share are read once.

The tokens of a tree are arranged in one row in depth-first order. A token then sees exactly those earlier tokens whose
subtree contains it, so one number per token, the end of its subtree, determines the whole attention mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knowledge_compression.evaluation.scoring.questions import Question

_SHORTEST_SHARE = 8  # tokens; questions that share fewer than this do not share a row


@dataclass
class Tree:
    """Texts with a common beginning, arranged in one row.

    Attributes:
        ids: token ids in depth-first order, ``[tokens]``.
        depths: position of each token in its text, ``[tokens]``.
        ends: for each token, one past the index of the last token of its subtree, ``[tokens]``.
        nodes, targets, slots: the predictions to read: the one after token ``nodes[i]`` gives the log-probability of
            ``targets[i]``, which belongs to continuation ``slots[i]``; ``[reads]`` each.
        context: number of tokens at its start that belong to no continuation.
        questions: indices of the questions of its texts, in order.
    """

    ids: NDArray[np.int64]
    depths: NDArray[np.int64]
    ends: NDArray[np.int64]
    nodes: NDArray[np.int64]
    targets: NDArray[np.int64]
    slots: NDArray[np.int64]
    context: int
    questions: Sequence[int]

    def __len__(self) -> int:
        """Number of tokens in the row."""
        return len(self.ids)

    @property
    def predictions(self) -> int:
        """Number of tokens whose logits are read, and so of rows of logits."""
        return len(np.unique(self.nodes))

    @property
    def is_chain(self) -> bool:
        """Whether it has no branches and so can be read like an ordinary text."""
        return bool(self.depths[-1] == len(self) - 1)


@dataclass
class _Text:
    """One continuation after its context, as the model reads it: the last token is only predicted."""

    ids: tuple[int, ...]
    context: int
    last: int
    slot: int
    question: int


@dataclass
class _Group:
    texts: list[_Text] = field(default_factory=list)
    size: int = 0


def plant(
    questions: Sequence[Question], *, pairs_per_token: float, longest: int, branches: bool = True, across: bool = True
) -> list[Tree]:
    """Trees that contain every continuation of every question once.

    Continuations of a question share its context and any common beginning; if there are so many that attention between
    them would cost more than reading the context again, they form several trees. Different questions share a tree if
    that saves more than the larger attention matrix costs, as with few-shot examples and WinoGrande's halves.

    Args:
        questions: slots are numbered over all of them in order, continuation by continuation.
        pairs_per_token: number of query-key pairs of attention that cost as much as everything else for one token.
        longest: maximum number of tokens in a tree of several texts.
        branches: whether a row may have branches; if not, only identical inputs share a row.
        across: whether different questions may share a tree.
    """
    groups: list[_Group] = []
    slots = count()
    for place, question in enumerate(questions):
        context = tuple(question.context)
        whole = [(*context, *continuation) for continuation in question.continuations]
        texts = [_Text(ids[:-1], len(context), ids[-1], next(slots), place) for ids in whole]
        groups += _cut(sorted(texts, key=lambda text: text.ids), pairs_per_token, longest)
    if not branches:
        alike = (list(texts) for group in groups for _, texts in groupby(group.texts, key=lambda text: text.ids))
        return [_tree(texts) for texts in alike]
    if across:
        groups = list(_merged(groups, pairs_per_token, longest))
    return [_tree(group.texts) for group in groups]


def attention_masks(ends: Tensor, depths: Tensor, dtype: torch.dtype, window: int | None) -> Tensor:
    """The attention mask of each row, as numbers to add to attention scores.

    Args:
        ends: ``[rows, tokens]``, see :class:`Tree`; 0 for padding, which sees only itself.
        depths: ``[rows, tokens]``.
        dtype: the model's.
        window: tokens that a sliding window spans, or None.

    Returns:
        ``[rows, 1, tokens, tokens]``: 0 where the query (third axis) sees the key (fourth), else the dtype's lowest
        number.
    """
    index = torch.arange(ends.shape[1], device=ends.device)
    ends = torch.maximum(ends, index + 1)
    seen = (index[:, None] >= index) & (index[:, None] < ends[:, None, :])
    if window is not None:
        seen &= depths[:, :, None] - depths[:, None, :] < window
    mask = torch.zeros(seen.shape, dtype=dtype, device=ends.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _cut(texts: Iterable[_Text], pairs_per_token: float, longest: int) -> Iterator[_Group]:
    """Split a question's texts into trees: siblings do not see each other, but attention computes their pairs.

    With s tokens per tree, rereading a context of c tokens costs c / s per token and attention costs s /
    pairs_per_token, so s = sqrt(c pairs_per_token) is best.
    """
    current = _Group()
    for text in texts:
        shared = _common(current.texts[-1].ids, text.ids) if current.texts else 0
        size = current.size + len(text.ids) - shared
        if current.texts and (size > longest or current.size**2 > shared * pairs_per_token):
            yield current
            current, size = _Group(), len(text.ids)
        current.texts.append(text)
        current.size = size
    if current.texts:
        yield current


def _merged(groups: Iterable[_Group], pairs_per_token: float, longest: int) -> Iterable[_Group]:
    """Merge neighbours in the order of their texts where that saves work."""
    current: _Group | None = None
    for group in sorted(groups, key=lambda group: group.texts[0].ids):
        if current is None:
            current = group
            continue
        shared = _common(current.texts[-1].ids, group.texts[0].ids)
        size = current.size + group.size - shared
        more_pairs = size**2 - current.size**2 - group.size**2
        if shared >= _SHORTEST_SHARE and size <= longest and shared * pairs_per_token > more_pairs:
            texts = sorted(current.texts + group.texts, key=lambda text: text.ids)
            current = _Group(texts, size)
        else:
            yield current
            current = group
    if current is not None:
        yield current


def _tree(texts: Sequence[_Text]) -> Tree:
    """The tree of texts in lexicographic order, which is depth-first order."""
    ids: list[int] = []
    depths: list[int] = []
    size = _distinct(texts)
    ends = np.full(size, size, dtype=np.int64)
    path = np.empty(max(len(text.ids) for text in texts), dtype=np.int64)
    nodes, targets, slots = [], [], []
    before: tuple[int, ...] = ()
    for text in texts:
        shared = _common(before, text.ids)
        ends[path[shared : len(before)]] = len(ids)
        path[shared : len(text.ids)] = np.arange(len(ids), len(ids) + len(text.ids) - shared)
        ids.extend(text.ids[shared:])
        depths.extend(range(shared, len(text.ids)))
        before = text.ids
        nodes.append(path[text.context - 1 : len(text.ids)].copy())
        targets.extend([*text.ids[text.context :], text.last])
        slots.extend([text.slot] * (len(text.ids) - text.context + 1))
    return Tree(
        ids=np.array(ids, dtype=np.int64),
        depths=np.array(depths, dtype=np.int64),
        ends=ends,
        nodes=np.concatenate(nodes),
        targets=np.array(targets, dtype=np.int64),
        slots=np.array(slots, dtype=np.int64),
        context=min(text.context for text in texts),
        questions=sorted({text.question for text in texts}),
    )


def _distinct(texts: Sequence[_Text]) -> int:
    """Tokens of the tree of texts in lexicographic order."""
    size, before = 0, ()  # type: tuple[int, tuple[int, ...]]
    for text in texts:
        size += len(text.ids) - _common(before, text.ids)
        before = text.ids
    return size


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    low, high = 0, limit  # a[:low] == b[:low], and a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle
    return low
