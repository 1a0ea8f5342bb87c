"""The soft prompts before every input of a model, placed there by any recovery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

# The selections of one forward pass: for each row, one prompt per layer. Filled when the pass has finished.
Choices = list[list[int]]


@dataclass(frozen=True)
class Prompts:
    """The prompts before every input, for code that runs a model; by default there are none.

    Attributes:
        positions: number of positions that they occupy in every input.
        choosing: a context manager for one forward pass in which each row selects among several prompts. It takes the
            number of tokens at the start of each row that are context (the rest are answers, which must not influence
            the selection), or None if all tokens under the mask are; it yields the selections of the pass. None if
            there is no selection.
    """

    positions: int = 0
    choosing: Callable[[Sequence[int] | None], AbstractContextManager[Choices]] | None = None


NO_PROMPTS = Prompts()
