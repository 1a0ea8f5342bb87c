"""What a walk gives to a calibrated method, what the method keeps of it, and how the walk goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.models import Model
from knowledge_compression.models.device import Device
from knowledge_compression.models.targets import TargetLayer


@dataclass(frozen=True)
class LayerInputs:
    """What one batch brings to a layer.

    Attributes:
        values: the inputs ``[tokens, in_features]`` in the precision of the forward pass, on the compute device.
        influence: how far an error in the layer's output at each token moves the output of its block, relative to that
            output's size, summed over the linears that read the tensor; float32 ``[tokens]``, None unless asked for.
    """

    values: Tensor
    influence: Tensor | None = None


class Statistics(ABC):
    """What a method keeps of a layer's inputs; one is made for all linears that read the same tensor."""

    @abstractmethod
    def update(self, inputs: LayerInputs) -> None:
        """Take in one batch."""

    @property
    def second_moments(self) -> Tensor | None:
        """``mean of x xᵀ``, float32 ``[in_features, in_features]``, where it is kept: it tells output errors."""
        return None


S = TypeVar("S", bound=Statistics)


class BlockMethod(Protocol[S]):
    """What a calibrated method gives to :func:`compress_blocks`."""

    def observe(self, in_features: int, device: torch.device) -> S:
        """Empty statistics for inputs of this width."""
        ...

    def shrink(self, layers: Sequence[TargetLayer], statistics: S) -> list[LayerReport]:
        """Compress, in place, linears that read the same inputs; may also put other modules in their places.

        Returns:
            One report for each layer, in their order.
        """
        ...


@dataclass(frozen=True)
class WalkSettings:
    """How a walk goes through the blocks.

    Attributes:
        true_sequential: observe and compress the linears of a block in the order in which they run, each on what those
            before it now give; then every linear is run only once. Else all are observed on the block as it was. A
            block that is used many times is always observed whole.
        by_influence: tell the method, too, how far an error at each token moves the block's output (one backward pass
            through each block, which must be whole).
        device: where blocks are computed, one at a time, e.g. ``cuda:0``; None where they lie.
        forward_dtype: type of the products in the forward passes of a float32 network: ``auto`` (see
            ``models.device``), ``bfloat16`` or ``float32``.
    """

    true_sequential: bool = False
    by_influence: bool = False
    device: str | None = None
    forward_dtype: str = "auto"

    def computed_on(self, model: Model) -> Device:
        """Where blocks are computed."""
        return Device.named(self.device) if self.device else Device.of(model.device)

    def multiplied_in(self, model: Model) -> torch.dtype | None:
        """The type of the forward passes' products, None for the network's own.

        Raises:
            BadInput: there is no such choice.
        """
        return self.computed_on(model).product_dtype(self.forward_dtype, model.dtype, "compression.forward_dtype")

    @property
    def text_passes(self) -> int:
        """How often the calibration text runs through each block, which is what a forecast counts."""
        if self.true_sequential:
            return 1  # every linear is compressed on the way
        return 3 if self.by_influence else 2  # to observe (perhaps backwards too), and to run the compressed block
