"""How a compression stores the resulting weights, which decides the formats that can hold them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from torch import Tensor

    from knowledge_compression.compression.layer_reports import LayerReport
    from knowledge_compression.models.targets import TargetLayer

INTEGERS, FP8, MXFP4, NVFP4, INT8, NF4 = "integers", "FP8", "MXFP4", "NVFP4", "INT8", "NF4"


@dataclass(frozen=True)
class Coding:
    """The meaning of the codes of a weight ``[out_features, in_features]``.

    Attributes:
        kind: what the codes are: :data:`INTEGERS`, :data:`FP8`, :data:`MXFP4`, :data:`NVFP4`, :data:`INT8` or
            :data:`NF4`.
        bits: bits of a code.
        block: outputs and inputs that share a scale; None stands for all of them.
        in_order: whether the inputs of a group are neighbours.
        symmetric: whether zero lies in the middle of the range.
        scale_bits: bits of a scale.
        activations: whether a layer's inputs are rounded in the same way at run time.
        static: whether inputs are rounded over a range fixed beforehand.
        run: number of neighbouring weights that share a scale, across rows, if scales are not shared by a
            :attr:`block`.
    """

    kind: str
    bits: int
    block: tuple[int | None, int | None]
    in_order: bool = True
    symmetric: bool = True
    scale_bits: int = 32
    activations: bool = False
    static: bool = False
    run: int | None = None

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None stands for all of them."""
        return self.block[1]


class CodedWeight(ABC):
    """The codes of one weight ``[out_features, in_features]``, from which other programs' files are made."""

    @property
    @abstractmethod
    def coding(self) -> Coding:
        """The meaning of the codes."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The weight that the codes represent, float32 ``[out_features, in_features]``."""

    @abstractmethod
    def rows(self, start: int, end: int) -> Self:
        """The part of some output rows, which must begin with a block of scales."""

    @abstractmethod
    def put_into(self, layer: TargetLayer) -> None:
        """Write the weight that these codes represent into the layer, and store with it what recovers them."""

    @abstractmethod
    def report(self, layer: TargetLayer) -> LayerReport:
        """The report on a layer that got these codes."""

    @abstractmethod
    def taken_apart(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All contents, as tensors and JSON-ready settings."""

    @classmethod
    @abstractmethod
    def put_together(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`taken_apart`."""
