"""The soft prompts before every input of a model, whichever recovery put them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

# The choices that one forward pass made: for each row one prompt a layer. Filled when the pass is over.
Choices = list[list[int]]


@dataclass(frozen=True)
class Prompts:
    """The prompts before every input, as whoever runs the model has to know of them; by default there are none.

    Attributes:
        positions: positions that they take from every input.
        choosing: a context manager for one forward pass, where each row chooses among several prompts. It takes how
            many tokens at the start of each row are context (the rest are answers, which the choice must not see), or
            None where all tokens that the mask shows are; it gives the choices of the pass. None where nothing is
            chosen.
    """

    positions: int = 0
    choosing: Callable[[Sequence[int] | None], AbstractContextManager[Choices]] | None = None


NO_PROMPTS = Prompts()
