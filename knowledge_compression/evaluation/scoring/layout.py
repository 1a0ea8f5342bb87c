"""The layout of texts in the input of a forward pass: rows of equal length, or end to end in one row.

Rows are padded to the longest. End to end there is no padding, so embeddings, norms and linear layers, which treat each
token separately, do no unnecessary work; only attention must know where a text ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from knowledge_compression.evaluation.scoring.packed_attention import Run, told_of
from knowledge_compression.evaluation.scoring.trees import attention_masks


class Layout:
    """The place of each text in the input of a forward pass.

    Attributes:
        lengths: number of tokens of each text, ``[texts]``.
        runs: groups of consecutive texts of equal length.
        starts: index of the first cell of each text, ``[texts]``, counted over all rows.
        rows, width: shape of the input.
        has_own_places: whether positions and masks must be given although no text has branches.
    """

    lengths: NDArray[np.int64]
    runs: Sequence[Run]
    starts: NDArray[np.int64]
    rows: int
    width: int
    has_own_places: bool

    def lay(self, numbers: NDArray[np.int64], fill: int = 0) -> NDArray[np.int64]:
        """Arrange one number per token, text after text, as ``[rows, width]``, with ``fill`` as padding."""
        raise NotImplementedError

    def read(self, network: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Run the network on inputs in this layout."""
        raise NotImplementedError

    def masks(self, ends: Tensor, depths: Tensor, dtype: torch.dtype, window: int | None) -> Tensor:
        """The attention mask, as numbers to add to attention scores.

        Args:
            ends, depths: ``[rows, width]``, in this layout; see :func:`~.trees.attention_masks`.
            dtype: the model's.
            window: tokens that a sliding window spans, or None.

        Returns:
            ``[rows, 1, cells, longest]``, with keys counted from the first cell of the query's text; end to end, only
            the cells of runs that need a mask.
        """
        longest = max((run.length for run in self.runs if run.masked), default=1)
        parts = [torch.empty(0, longest, dtype=dtype, device=ends.device)]
        cells = [run.cells for run in self.runs]
        for run, until, deep in zip(self.runs, ends.view(-1).split(cells), depths.view(-1).split(cells), strict=True):
            if run.masked:
                mask = attention_masks(until.view(run.texts, -1), deep.view(run.texts, -1), dtype, window)
                parts.append(pad(mask.flatten(0, 2), (0, longest - run.length)))
        return torch.cat(parts).view(self.rows, 1, -1, longest)


class Rows(Layout):
    """One row per text, padded to the longest."""

    has_own_places = False

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = np.array(lengths)
        self.rows, self.width = len(lengths), max(lengths)
        self.runs = [Run(self.rows, self.width, masked=True)]
        self.starts = np.arange(self.rows) * self.width

    def lay(self, numbers: NDArray[np.int64], fill: int = 0) -> NDArray[np.int64]:
        """See :meth:`Layout.lay`."""
        laid = np.full((self.rows, self.width), fill)
        laid[np.arange(self.width) < self.lengths[:, None]] = numbers
        return laid

    def read(self, network: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """See :meth:`Layout.read`."""
        return network(**inputs)


class EndToEnd(Layout):
    """One row for all texts.

    Args:
        lengths: number of tokens of each text; neighbours of equal length share one call of attention.
        masked: for each text, whether it needs a mask beyond the causal one.
    """

    has_own_places = True

    def __init__(self, lengths: Sequence[int], masked: Sequence[bool]) -> None:
        self.lengths = np.array(lengths)
        self.rows, self.width = 1, sum(lengths)
        self.runs = list(_runs(lengths, masked))
        self.starts = np.cumsum(self.lengths) - self.lengths

    def lay(self, numbers: NDArray[np.int64], fill: int = 0) -> NDArray[np.int64]:
        """See :meth:`Layout.lay`; there is no padding."""
        return numbers[None]

    def read(self, network: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """See :meth:`Layout.read`; attention is given the end of each text."""
        with told_of(network, self.runs) as runs:
            return network(**inputs, **runs)


def _runs(lengths: Sequence[int], masked: Sequence[bool]) -> Iterator[Run]:
    for length, texts in groupby(zip(lengths, masked, strict=True), key=lambda text: text[0]):
        alike = [mask for _, mask in texts]
        yield Run(len(alike), length, any(alike))
