"""The inputs that a walk passes to a calibrated method, the statistics that it keeps, and the settings of the walk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.heavy import nn, torch
from knowledge_compression.models import Model
from knowledge_compression.models.device import Device
from knowledge_compression.models.targets import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor

    from knowledge_compression.compression.walk.tuning import CompressedBlock


@dataclass(frozen=True)
class LayerInputs:
    """A layer's inputs in one batch.

    Attributes:
        values: the inputs ``[tokens, in_features]`` in the dtype of the forward pass, on the compute device.
        influence: how far an error in the layer's output at each token moves the output of its block, relative to that
            output's size, summed over the linears that read the tensor; float32 ``[tokens]``, None unless asked for.
        dense: the layer's inputs at the same tokens in the uncompressed network, ``[tokens, in_features]``; None unless
            requested, and for experts, whose tokens may differ there.
        narrower: the dtype to which the layer's product rounds ``values``, if the forward passes are narrowed.
    """

    values: Tensor
    influence: Tensor | None = None
    dense: Tensor | None = None
    narrower: torch.dtype | None = None


class Statistics(ABC):
    """The statistics that a method keeps of a layer's inputs; all linears that read the same tensor share one."""

    @abstractmethod
    def update(self, inputs: LayerInputs) -> None:
        """Add one batch."""

    @property
    def second_moments(self) -> Tensor | None:
        """``mean of x xᵀ``, float32 ``[in_features, in_features]``, which gives output errors; None if not kept."""
        return None


class Divisible(Statistics):
    """Statistics of inputs that can be divided by factors, if the parameters that produce them allow it.

    Attributes:
        factors: by which the inputs have been divided, float32 ``[in_features]``; None if they have not.
        divided_by: names of the parameters that were divided for this.
    """

    factors: Tensor | None = None
    divided_by: Sequence[str] = ()

    @abstractmethod
    def divide(self, factors: Tensor) -> None:
        """Turn into the statistics of inputs that were divided by ``factors`` from the beginning."""


S = TypeVar("S", bound=Statistics)
D = TypeVar("D", bound=Divisible)


@dataclass(frozen=True)
class Observed(Generic[S]):
    """A block whose inputs have been observed and whose layers are about to be compressed.

    Attributes:
        path: its name in the network.
        module: the block.
        groups: its layers that read the same tensor, in the order in which they run, and the statistics of it.
        run: runs the block on the first batch of the calibration text and returns its output.
    """

    path: str
    module: nn.Module
    groups: Sequence[tuple[Sequence[TargetLayer], S]]
    run: Callable[[], Any]


class BlockMethod(Protocol[S]):
    """The part of a calibrated method that :func:`compress_blocks` calls."""

    def observe(self, in_features: int, device: torch.device) -> S:
        """Empty statistics for inputs of this width."""
        ...

    def prepare(self, block: Observed[S]) -> None:
        """Change a block before its layers are compressed, if the method does so."""
        return

    def shrink(self, layers: Sequence[TargetLayer], statistics: S) -> list[LayerReport]:
        """Compress, in place, linears that read the same inputs; may also replace their modules.

        Returns:
            One report per layer, in order.
        """
        ...

    def tune(self, block: CompressedBlock) -> None:
        """Improve a compressed block as a whole, in place; only called if the walk's settings ask for it."""
        return


@dataclass(frozen=True)
class WalkSettings:
    """The settings of a walk through the blocks.

    Attributes:
        true_sequential: observe and compress the linears of a block in the order in which they run, each on the outputs
            of the compressed ones before it, so that every linear runs only once. Otherwise all are observed on the
            uncompressed block. A block that is used several times is always observed whole.
        by_influence: also pass the method the influence of each token: how far an error there moves the block's output
            (one backward pass through each block, which must be whole).
        device: where blocks are computed, one at a time, e.g. ``cuda:0``; None computes them where they are stored.
        forward_dtype: dtype of the matrix products in the forward passes of a float32 network: ``auto`` (see
            ``models.device``), ``bfloat16`` or ``float32``.
        dense_inputs: also pass the method each layer's inputs in the uncompressed network, through which the text is
            then run too, block by block.
        tuned_tokens: if above 0, pass each compressed block as a whole to the method's ``tune``, with the output that
            the uncompressed block has in the uncompressed network. Needs whole blocks. The number is that of the tokens
            that go forwards and backwards through each block, and is used by the forecast.
    """

    true_sequential: bool = False
    by_influence: bool = False
    device: str | None = None
    forward_dtype: str = "auto"
    dense_inputs: bool = False
    tuned_tokens: int = 0

    @property
    def beside(self) -> bool:
        """Whether the text also goes through the uncompressed network."""
        return self.dense_inputs or self.tuned_tokens > 0

    def computed_on(self, model: Model) -> Device:
        """The device on which blocks are computed."""
        return Device.named(self.device) if self.device else Device.of(model.device)

    def multiplied_in(self, model: Model) -> torch.dtype | None:
        """The dtype of the products in the forward passes, None for the network's own.

        Raises:
            BadInput: ``forward_dtype`` is not one of the choices.
        """
        return self.computed_on(model).product_dtype(self.forward_dtype, model.dtype, "compression.forward_dtype")

    def passes(self, tokens: int) -> float:
        """How often calibration text of this many tokens goes through each block, for the forecast."""
        extra = self.beside + 3 * self.tuned_tokens / tokens  # a backward pass is twice the work of a forward pass
        if self.true_sequential:
            return extra + 1  # every linear is compressed within the one pass
        # one pass to observe (perhaps a backward one too), one through the compressed block
        return extra + (3 if self.by_influence else 2)
