"""How confident a model is among the answers that are ranked for an item: columns of the item table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from knowledge_compression.heavy import pl

MOST = 128  # shares kept of an item; the others are smaller


def columns() -> dict[str, pl.DataType]:
    """The columns: null where answers are not ranked among a list."""
    return {
        "shares": pl.List(pl.Float32()),  # shares of the answers, largest first; at most 128
        "gold_share": pl.Float64(),  # share of the right answer
        "brier": pl.Float64(),  # the sum over all answers of (share - 1 for the right one, 0 for the others) squared
    }


def confidence(scores: Sequence[float], gold: int) -> dict[str, Any]:
    """The columns of one item: its answers' shares are the softmax of their scores.

    Args:
        scores: in nats, of every answer; calibrated, if the item is ranked by calibrated scores.
        gold: index of the right answer.
    """
    numbers = np.asarray(scores, dtype=np.float64)
    shares = np.exp(numbers - numbers.max())
    shares /= shares.sum()
    right = float(shares[gold])
    return {
        "shares": np.sort(shares)[::-1][:MOST].astype(np.float32).tolist(),
        "gold_share": right,
        "brier": float((shares**2).sum() - 2 * right + 1),
    }
