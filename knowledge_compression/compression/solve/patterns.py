"""n:m sparsity patterns, e.g. 2:4, which some GPUs multiply faster: n of m neighbouring weights are kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Keep ``keep`` of every ``of`` neighbouring weights along the inputs."""

    keep: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse a pattern such as ``2:4``.

        Raises:
            BadInput: the text is not of the form n:m with 0 < n < m.
        """
        keep, colon, of = str(text).partition(":")
        if not (colon and keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of)):
            raise BadInput(f"pattern={text} is not of the form n:m with 0 < n < m, e.g. pattern=2:4")
        return cls(int(keep), int(of))

    def check(self, layers: Iterable[TargetLayer]) -> None:
        """Refuse layers whose number of inputs is not a multiple of m."""
        for layer in layers:
            if (inputs := layer.weight.shape[1]) % self.of:
                raise BadInput(
                    f"compression.pattern={self} does not divide the {inputs} inputs of {layer.path}; choose n:m "
                    "with an m that divides them, e.g. 2:4"
                )

    def removes(self, scores: Tensor) -> Tensor:
        """Mask of what to remove, bool ``[out, in]``: the ``of - keep`` lowest of a group, the first among equals."""
        groups = scores.abs().unflatten(1, (-1, self.of))
        order = groups.argsort(dim=-1, stable=True)[..., : self.of - self.keep]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(1)

    def __str__(self) -> str:
        """The pattern as it is written in settings."""
        return f"{self.keep}:{self.of}"
