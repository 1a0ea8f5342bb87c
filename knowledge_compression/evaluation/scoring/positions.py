"""The positions at which a scorer predicts tokens: the text before each, and the items that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from knowledge_compression.evaluation.scoring.questions import Blank, Question
from knowledge_compression.evaluation.scoring.trees import Tree

KEY_BYTES = 16


@dataclass(frozen=True)
class Position:
    """A position at which one token is predicted.

    Attributes:
        key: digest of the text before it: equal for the same text in any batch.
        gold: the right token, by the id of each item for which the position is read; None if the suite gives no right
            token. Empty if it is compared for no item.
    """

    key: bytes
    gold: Mapping[str, int | None]


class Watcher(Protocol):
    """Receives the states and logits that a scorer computes."""

    def saw(self, positions: Sequence[Position], states: Tensor, logits: Tensor) -> None:
        """Called once a forward pass.

        Args:
            positions: those read in the pass.
            states: the input of the vocabulary head, ``[positions, hidden]``.
            logits: the output of the vocabulary head, ``[positions, vocabulary]``.
        """
        ...


def key_of(text: Sequence[int], said: Sequence[int] = (), position: int | None = None) -> bytes:
    """The key of a position after ``text``, inside it, or after ``said`` in answer to it."""
    digest = blake2b(np.asarray(text, "<i4").tobytes(), digest_size=KEY_BYTES)
    if position is not None or len(said):
        digest.update(np.asarray([len(text), -1 if position is None else position, *said], "<i4").tobytes())
    return digest.digest()


def position_of(blank: Blank) -> Position:
    """The position of a blank."""
    key = key_of(blank.ids, blank.decoder_ids, blank.position)
    return Position(key, dict.fromkeys(blank.items, blank.gold))


def keys_in_trees(trees: Sequence[Tree], starts: NDArray[np.int64], cells: NDArray[np.int64]) -> list[bytes]:
    """The keys of the positions after tokens of trees.

    Args:
        trees: the trees in the input of a pass.
        starts: the first cell of each.
        cells: the cells of the tokens, ascending.
    """
    found: list[bytes] = []
    bounds = np.searchsorted(cells, [*starts, np.iinfo(np.int64).max])
    for tree, start, low, high in zip(trees, starts, bounds, bounds[1:], strict=False):
        found += _keys_of_tree(tree, set((cells[low:high] - start).tolist()))
    return found


def _keys_of_tree(tree: Tree, wanted: Set[int]) -> Iterator[bytes]:
    """The keys of the positions after the wanted tokens of a tree, each that of the text ending there."""
    path = [blake2b(digest_size=KEY_BYTES)]  # digests of the beginnings of the current text, the empty one first
    ids = tree.ids.astype("<i4").tobytes()
    for i, depth in enumerate(tree.depths.tolist()):
        del path[depth + 1 :]
        digest = path[depth].copy()
        digest.update(ids[4 * i : 4 * i + 4])
        path.append(digest)
        if i in wanted:
            yield digest.digest()


def keys_in_rows(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], width: int, cells: NDArray[np.int64]
) -> list[bytes]:
    """The keys of the positions in a decoder's text.

    Args:
        rows: the encoder's input and the decoder's input.
        width: cells of a row.
        cells: the cells of the decoder's tokens, counted over all rows.
    """
    places = (divmod(cell, width) for cell in cells.tolist())
    return [key_of(rows[row][0], rows[row][1][: place + 1]) for row, place in places]


class Slots:
    """Questions whose continuations are numbered consecutively.

    Attributes:
        questions: the questions.
        starts: number of the first continuation of each, and one past the last of all.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions
        self.starts = np.cumsum([0, *(len(question.continuations) for question in questions)])

    def positions(
        self, keys: Sequence[bytes], of_read: NDArray[np.int64], targets: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> list[Position]:
        """The positions read, given the key of each.

        Args:
            keys: ``[positions]``.
            of_read: for each read, the index of its position, ``[reads]``.
            targets: the token whose log-probability is read, ``[reads]``.
            slots: the number of the continuation that it belongs to, ``[reads]``.
        """
        gold: list[dict[str, int | None]] = [{} for _ in keys]
        owners = np.searchsorted(self.starts, slots, side="right") - 1
        places = slots - self.starts[owners]
        for read, owner, place, target in zip(*(a.tolist() for a in (of_read, owners, places, targets)), strict=True):
            question = self.questions[owner]
            if place in question.right:
                gold[read][question.right[place]] = target
            for item in question.items if not question.right else ():
                if question.gold == place:
                    gold[read][item] = target
                else:
                    gold[read].setdefault(item, None)
        return [Position(key, of) for key, of in zip(keys, gold, strict=True)]
