"""The exact k-th smallest magnitude of many tensors, in constant memory.

The bits of a non-negative IEEE float, read as an integer, are in the float's order. So the k-th smallest magnitude is
found by radix selection: one pass counts the upper half of the bits, which gives the bucket of the k-th value, and a
    second pass counts the lower half inside that bucket. Both walk the tensors in small pieces; nothing is sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch

Walk: TypeAlias = "Callable[[], Iterable[torch.Tensor]]"
"""Yields the same tensors in the same order each time it is called, e.g. from the shards of a checkpoint."""

_PIECE = 1 << 20  # values processed together: a few megabytes of scratch memory, which stay in the processor's cache
_HALF = 16
_LOW = (1 << _HALF) - 1


class Cut:
    """The k smallest magnitudes of a walk: all below a threshold, and the first few of those equal to it.

    Attributes:
        threshold: the k-th smallest magnitude; -1.0 where k is 0.
        ties: how many of the values that equal the threshold are among the k, counted from the first.
    """

    def __init__(self, threshold_bits: int, ties: int) -> None:
        self._bits = threshold_bits
        self.ties = ties
        self._ties_left = ties

    @property
    def state(self) -> tuple[int, int]:
        """The state from which a cut can continue: ``Cut(*state)``."""
        return self._bits, self._ties_left

    @property
    def threshold(self) -> float:
        """The threshold as a floating-point number."""
        return float(torch.tensor(self._bits, dtype=torch.int32).view(torch.float32)) if self._bits >= 0 else -1.0

    def removes(self, piece: torch.Tensor) -> torch.Tensor:
        """Boolean mask, of the piece's shape, of the values among the k smallest.

        Pieces must be passed once each, in the order of the walk: of equal values the first are among the k.
        """
        bits = _magnitude_bits(piece)
        mask = bits < self._bits
        if self._ties_left:
            equal = bits == self._bits
            if count := int(equal.sum()):
                if count > self._ties_left:
                    equal &= equal.flatten().cumsum(0).view_as(equal) <= self._ties_left
                self._ties_left -= min(count, self._ties_left)
                mask |= equal
        return mask


def smallest(walk: Walk, k: int) -> Cut:
    """The cut that separates exactly the ``k`` smallest magnitudes of all the walk's values.

    Args:
        walk: called at most three times; yields floating-point tensors of any shape and device, float32 or narrower.
        k: how many values to cut off, 0 to the number of values.

    Raises:
        ValueError: there are fewer than ``k`` values.
        BadInput: the tensors' dtype is wider than float32, so that 32 bits cannot rank them.
    """
    if k == 0:
        return Cut(-1, 0)
    upper, below = _bucket_of(k, (bits >> _HALF for bits in _all_bits(walk)), bins=1 << (_HALF - 1))
    inside = ((bits[(bits >> _HALF) == upper]) & _LOW for bits in _all_bits(walk))
    lower, below_inside = _bucket_of(k - below, inside, bins=1 << _HALF)
    return Cut(upper << _HALF | lower, ties=k - below - below_inside)


def pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of the tensor, cut along its first dimension into pieces of about a million values."""
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    row = max(tensor[:1].numel(), 1)
    yield from tensor.split(max(_PIECE // row, 1))


def _all_bits(walk: Walk) -> Iterator[torch.Tensor]:
    for tensor in walk():
        for piece in pieces(tensor):
            yield _magnitude_bits(piece).flatten()


def _magnitude_bits(values: torch.Tensor) -> torch.Tensor:
    if values.dtype == torch.float64:
        raise BadInput("weights of float64 cannot be ranked in 32 bits; load the model with dtype=float32 or narrower")
    return values.abs().to(torch.float32).view(torch.int32)  # narrower types convert to float32 exactly


def _bucket_of(k: int, keys: Iterator[torch.Tensor], bins: int) -> tuple[int, int]:
    """The bucket that holds the k-th smallest key, and how many keys lie in the buckets before it."""
    counts: torch.Tensor | None = None
    for part in keys:
        histogram = torch.bincount(part, minlength=bins)
        counts = histogram if counts is None else counts + histogram.to(counts.device)
    total = 0 if counts is None else counts.cumsum(0)
    if counts is None or not isinstance(total, torch.Tensor) or int(total[-1]) < k:
        raise ValueError(f"there are fewer than {k} values")
    bucket = int(torch.searchsorted(total, k))
    return bucket, int(total[bucket] - counts[bucket])
