"""How a compression stores the weights that it leaves, which decides the formats that can hold them."""

from __future__ import annotations

from dataclasses import dataclass

INTEGERS = "integers"


@dataclass(frozen=True)
class Coding:
    """How the codes of a weight ``[out_features, in_features]`` are to be read.

    Attributes:
        kind: what the codes are, e.g. :data:`INTEGERS`.
        bits: of a code.
        block: outputs and inputs that share a scale; None stands for all of them.
        in_order: whether the inputs of a group are neighbours.
        symmetric: whether zero lies in the middle of the range.
        scale_bits: of a scale.
    """

    kind: str
    bits: int
    block: tuple[int | None, int | None]
    in_order: bool = True
    symmetric: bool = True
    scale_bits: int = 32

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None stands for all of them."""
        return self.block[1]
