"""Patterns n:m of weights that stay among neighbouring inputs, e.g. 2:4, which GPUs can multiply faster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from knowledge_compression.errors import BadInput
from knowledge_compression.models import TargetLayer


@dataclass(frozen=True)
class Pattern:
    """``keep`` weights of every ``of`` neighbours along the inputs."""

    keep: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``2:4``.

        Raises:
            BadInput: it is not two numbers n:m with 0 < n < m.
        """
        keep, colon, of = str(text).partition(":")
        if not (colon and keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of)):
            raise BadInput(f"pattern={text} is not of the form n:m with 0 < n < m, e.g. pattern=2:4")
        return cls(int(keep), int(of))

    def check(self, layers: Iterable[TargetLayer]) -> None:
        """Refuse layers whose number of inputs the pattern does not divide."""
        for layer in layers:
            if (inputs := layer.weight.shape[1]) % self.of:
                raise BadInput(f"pattern={self} does not divide the {inputs} inputs of {layer.path}")

    def removes(self, scores: Tensor) -> Tensor:
        """Boolean mask ``[out, in]`` of what goes: of every group the ``of - keep`` least, among equals the first."""
        groups = scores.abs().unflatten(1, (-1, self.of))
        order = groups.argsort(dim=-1, stable=True)[..., : self.of - self.keep]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(1)

    def __str__(self) -> str:
        """As the user types it."""
        return f"{self.keep}:{self.of}"
