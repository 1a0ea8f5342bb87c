"""Hadamard matrices: orthogonal up to a factor, with entries of one magnitude."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

Signs = NDArray[np.int8]


@cache
def hadamard(size: int) -> Signs | None:
    """A matrix of ones and minus ones ``[size, size]`` with ``H Hᵀ = size I``; None if this function cannot build one.

    The sizes 1, 2, ``q + 1`` and ``2 (q + 1)`` for primes ``q`` (Paley 1933) are built, and Kronecker products of these
    (Sylvester). That covers the widths of today's models, e.g. 576 = 16 x 36. The smallest size that exists and is
    missing is 52.
    """
    if size in (1, 2):
        return np.array([[1, 1], [1, -1]], dtype=np.int8)[:size, :size]
    if size % 4:
        return None
    for first in [2, *range(4, math.isqrt(size) + 1, 4)]:
        if size % first == 0 and (a := hadamard(first)) is not None and (b := hadamard(size // first)) is not None:
            return np.asarray(np.kron(a, b), dtype=np.int8)
    if _is_prime(size - 1):  # 3 modulo 4
        one = np.eye(size, dtype=np.int8) + _bordered(size - 1, -1)
        return np.asarray(one, dtype=np.int8)
    if _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        half, ones = _bordered(size // 2 - 1, 1), np.eye(size // 2, dtype=np.int8)
        two = np.kron(half, np.array([[1, 1], [1, -1]])) + np.kron(ones, np.array([[1, -1], [-1, -1]]))
        return np.asarray(two, dtype=np.int8)
    return None


def _is_prime(number: int) -> bool:
    return number > 2 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _bordered(prime: int, corner: int) -> Signs:
    """Jacobsthal's matrix, whose entries are the quadratic characters of ``i - j``, with a border of ones."""
    squares = {i * i % prime for i in range(1, prime)}
    character = np.array([0] + [1 if i in squares else -1 for i in range(1, prime)], dtype=np.int8)
    inner = character[(np.arange(prime)[:, None] - np.arange(prime)) % prime]
    bordered = np.ones((prime + 1, prime + 1), dtype=np.int8)
    bordered[0, 0], bordered[1:, 0], bordered[1:, 1:] = 0, corner, inner
    return bordered
