"""How the texts of one forward pass lie in its input: rows of equal length, or end to end in one row.

Rows are padded to the longest. End to end there is no padding, so that embeddings, norms and linear layers, which treat
each token by itself, read what is there and nothing else; only attention has to know where a text ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from knowledge_compression.evaluation.scoring.heads import without_adapters
from knowledge_compression.evaluation.scoring.trees import attention_masks

_WITHIN = "sdpa"  # what attends within a text
_END_TO_END = "end_to_end"


@dataclass(frozen=True)
class Run:
    """Texts that lie beside each other and have as many cells each.

    Attributes:
        texts: how many.
        length: cells of each.
        masked: whether a mask tells what its tokens see; if not, they see what the layer lets them see in any text.
    """

    texts: int
    length: int
    masked: bool

    @property
    def cells(self) -> int:
        """How many they have together."""
        return self.texts * self.length

    @property
    def masked_cells(self) -> int:
        """How many of them a mask has something to say of."""
        return self.cells if self.masked else 0

    def apart(self, states: Tensor) -> Tensor:
        """Its texts one by one: from ``[any, cells, any]`` to ``[texts, any, length, any]``."""
        return states.unflatten(1, (self.texts, self.length)).transpose(0, 1)


class Layout:
    """Where each text of a forward pass lies.

    Attributes:
        lengths: tokens of each text, ``[texts]``.
        runs: the texts by length, in their order.
        starts: first cell of each text, ``[texts]``, counted through all rows.
        rows, width: of the input.
        has_own_places: whether positions and masks must be given although no text has branches.
    """

    lengths: NDArray[np.int64]
    runs: Sequence[Run]
    starts: NDArray[np.int64]
    rows: int
    width: int
    has_own_places: bool

    def lay(self, numbers: NDArray[np.int64], fill: int = 0) -> NDArray[np.int64]:
        """A number for each token, text after text, as ``[rows, width]``, with ``fill`` where padding is."""
        raise NotImplementedError

    def read(self, network: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """What the network says to inputs that lie so."""
        raise NotImplementedError

    def masks(self, ends: Tensor, depths: Tensor, dtype: torch.dtype, window: int | None) -> Tensor:
        """What each token sees, as numbers to add to attention scores.

        Args:
            ends, depths: ``[rows, width]``, laid; see :func:`~.trees.attention_masks`.
            dtype: the model's.
            window: tokens that a sliding window spans, or None.

        Returns:
            ``[rows, 1, cells, longest]``, where keys are counted from the first cell of the query's text; end to end
            only the cells of runs that are masked.
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
    """A row for each text, padded to the longest."""

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
        lengths: tokens of each text; those of one length beside each other are attended to together.
        masked: whether it needs a mask to tell what its tokens see, for each text.
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
        """See :meth:`Layout.read`; attention is told where each text ends."""
        config = without_adapters(network).config
        config._attn_implementation = _END_TO_END
        try:
            return network(**inputs, runs=self.runs)
        finally:
            config._attn_implementation = _WITHIN


def can_lie_end_to_end(network: nn.Module) -> bool:
    """Whether attention in this network can be told where a text ends.

    It can where transformers lets its attention function be exchanged, and where that is PyTorch's own.
    """
    inner = without_adapters(network)
    replaceable = getattr(inner, "_supports_attention_backend", False)
    return bool(replaceable) and inner.config._attn_implementation == _WITHIN


def _runs(lengths: Sequence[int], masked: Sequence[bool]) -> Iterator[Run]:
    for length, texts in groupby(zip(lengths, masked, strict=True), key=lambda text: text[0]):
        alike = [mask for _, mask in texts]
        yield Run(len(alike), length, any(alike))


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, masks: Tensor, *, runs: Sequence[Run], **options: Any
) -> tuple[Tensor, None]:
    """Attention of each text of a row to itself, by the function that attends within texts.

    Args:
        module: the attention layer.
        query, key, value: ``[1, heads, cells, size]`` (keys and values may have fewer heads).
        masks: ``[1, 1, masked cells, longest]``, see :meth:`Layout.masks`.
        runs: the texts.
        options: for the function within texts.

    Returns:
        ``[1, cells, heads, size]``, and no weights.
    """
    attend = ALL_ATTENTION_FUNCTIONS[_WITHIN]
    cells = [run.cells for run in runs]
    states = zip(*(every[0].split(cells, 1) for every in (query, key, value)), strict=True)
    seen = masks[0].split([run.masked_cells for run in runs], 1)
    parts = []
    for run, of_run, mask in zip(runs, states, seen, strict=True):
        own = run.apart(mask)[..., : run.length] if run.masked else None
        parts.append(attend(module, *map(run.apart, of_run), own, **options)[0].flatten(0, 1))
    return torch.cat(parts)[None], None


AttentionInterface.register(_END_TO_END, _attention)
