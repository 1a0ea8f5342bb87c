"""Attention in a row that holds several texts end to end: each text attends only to itself.

It is a function for transformers' ``AttentionInterface`` and replaces PyTorch's own for one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from knowledge_compression.models.bodies import without_adapters

_WITHIN = "sdpa"  # the attention function within a text
_END_TO_END = "end_to_end"
_PIECE = 64  # queries
_IN_PIECES = range(160, 768)  # text lengths for which this is faster on a CPU (docs/performance.md)


@dataclass(frozen=True)
class Run:
    """Consecutive texts of equal length.

    Attributes:
        texts: number of texts.
        length: number of cells of each.
        masked: whether they need a mask beyond the layer's own.
    """

    texts: int
    length: int
    masked: bool

    @property
    def cells(self) -> int:
        """The number of their cells."""
        return self.texts * self.length

    @property
    def masked_cells(self) -> int:
        """The number of their cells that need a mask."""
        return self.cells if self.masked else 0

    def apart(self, states: Tensor) -> Tensor:
        """Separate its texts: from ``[any, cells, any]`` to ``[texts, any, length, any]``."""
        return states.unflatten(1, (self.texts, self.length)).transpose(0, 1)


def can_lie_end_to_end(network: nn.Module) -> bool:
    """Whether attention in this network can be given the ends of texts.

    It can if transformers lets its attention function be replaced and that function is PyTorch's own.
    """
    inner = without_adapters(network)
    replaceable = getattr(inner, "_supports_attention_backend", False)
    return bool(replaceable) and inner.config._attn_implementation == _WITHIN


@contextmanager
def told_of(network: nn.Module, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Give attention the ends of texts during one forward pass; yields the additional arguments of that pass."""
    config = without_adapters(network).config
    config._attn_implementation = _END_TO_END
    try:
        yield {"runs": runs}
    finally:
        config._attn_implementation = _WITHIN


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, masks: Tensor, *, runs: Sequence[Run], **options: Any
) -> tuple[Tensor, None]:
    """Attention of each text of a row to itself, by the attention function within texts.

    Args:
        module: the attention layer.
        query, key, value: ``[1, heads, cells, size]`` (keys and values may have fewer heads).
        masks: ``[1, 1, cells with a mask, longest]``, see :meth:`Layout.masks`.
        runs: the texts.
        options: for the attention function within texts.

    Returns:
        ``[1, cells, heads, size]``, and None instead of attention weights.
    """
    cells = [run.cells for run in runs]
    states = zip(*(every[0].split(cells, 1) for every in (query, key, value)), strict=True)
    seen = masks[0].split([run.masked_cells for run in runs], 1)
    parts = []
    for run, of_run, mask in zip(runs, states, seen, strict=True):
        own = run.apart(mask)[..., : run.length] if run.masked else None
        q, k, v = map(run.apart, of_run)
        parts.append(_within(module, q, k, v, own, **options).flatten(0, 1))
    return torch.cat(parts)[None], None


def _within(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Tensor:
    """Attention of texts of equal length, each to itself, ``[texts, length, heads, size]``."""
    in_pieces = query.device.type == "cpu" and query.shape[2] in _IN_PIECES
    if in_pieces and mask is None and getattr(module, "is_causal", False):
        return causal_attention_in_pieces(query, key, value, options.get("scaling")).transpose(1, 2)
    attended: Tensor = ALL_ATTENTION_FUNCTIONS[_WITHIN](module, query, key, value, mask, **options)[0]
    return attended


def causal_attention_in_pieces(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention for some queries at a time, with only those keys that at least one of them may see.

    PyTorch's CPU kernel processes keys in blocks of 512, whether a query may see them or not.

    Args:
        query: ``[texts, heads, length, size]``.
        key, value: the same, with as many heads or with fewer, each shared by consecutive heads of the query.
        scale: factor on the dot products; None takes one over the square root of the size.

    Returns:
        ``[texts, heads, length, size]``.
    """
    length = query.shape[2]
    before = (length - 1) // _PIECE * _PIECE  # start of the last piece; the masks of the others are parts of its mask
    hidden = query.new_full((_PIECE, before + _PIECE), -torch.inf).triu(before + 1)
    parts = []
    for start in range(0, length, _PIECE):
        end = min(start + _PIECE, length)
        mask = hidden[: end - start, before - start : before - start + end]
        seen = key[:, :, :end], value[:, :, :end]
        part = scaled_dot_product_attention(query[:, :, start:end], *seen, mask, scale=scale, enable_gqa=True)
        parts.append(part)
    return torch.cat(parts, 2)


AttentionInterface.register(_END_TO_END, _attention)
