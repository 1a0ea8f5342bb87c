"""SmoothQuant: int8 weights and activations, with outlier channels scaled into the weights (Xiao et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from knowledge_compression.compression.calibrated import Calibrated, Solved
from knowledge_compression.compression.solve.coding import Coding
from knowledge_compression.compression.solve.int8 import INPUT_STEPS, check_input_steps, int8_coding
from knowledge_compression.compression.walk.statistics import Divisible, LayerInputs, Observed
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.identity import ADDED
from knowledge_compression.models import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor

    from knowledge_compression.compression.formats.int8_variants import SmoothedInt8Linear
    from knowledge_compression.models.replaced import ReplacedLinear


class LargestInputs(Divisible):
    """The largest magnitude of each input channel."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.largest = torch.zeros(in_features, device=device)

    def update(self, inputs: LayerInputs) -> None:
        """Add a batch."""
        self.largest = torch.maximum(self.largest, inputs.values.float().abs().amax(0))

    def divide(self, factors: Tensor) -> None:
        """Turn into the statistics of divided inputs."""
        self.largest = self.largest / factors


@dataclass(frozen=True)
class SmoothQuant(Calibrated[LargestInputs]):
    """Replace the targets by int8 layers that divide their inputs, channel by channel, before rounding them.

    Linears that read the same inputs share one divisor, ``max|X_j|^alpha / max|W_j|^(1 - alpha)`` (eq. 4). Each layer
    divides its inputs by it. With ``fold``, as in the published code, the norm or linear layers that produce the inputs
    are divided instead (``walk/folding.py``), which gives the same product, and layers that other programs can load.
    Inputs that no such layer can divide are rounded as they are, and the report names a fallback. Activations are
    rounded per token at run time (the paper's O1), weights per row.

    Attributes:
        alpha: migration strength: how much of the outliers is moved into the weights, in [0, 1].
        fold: whether what precedes the layers takes the divisors.
        input_steps: the steps between zero and a token's largest magnitude: 127, as published and in vLLM, or 127.5, as
            transformers computes files of compressed-tensors.
    """

    alpha: float = 0.5
    fold: bool = field(default=False, metadata=ADDED)
    input_steps: float = field(default=INPUT_STEPS[0], metadata=ADDED)
    name = "smoothquant"

    def __post_init__(self) -> None:
        """Refuse an alpha outside [0, 1], and steps that no program has."""
        check_input_steps(self.input_steps)
        if not 0.0 <= self.alpha <= 1.0:
            raise BadInput(f"compression.alpha={self.alpha} is out of range; it must lie in [0, 1], e.g. 0.5")

    @property
    def coding(self) -> Coding | None:
        """Integers with a scale per row, if the layers do not hold the divisors."""
        return int8_coding(static=False) if self.fold else None

    @property
    def for_codes(self) -> str:
        """The setting that gives codes other programs can read."""
        return "compression.fold=true"

    @property
    def modules(self) -> tuple[type[ReplacedLinear], ...]:
        """Int8 layers, with a divisor unless it is folded."""
        from knowledge_compression.compression.formats.int8_linear import Int8Linear
        from knowledge_compression.compression.formats.int8_variants import SmoothedInt8Linear

        return (Int8Linear,) if self.fold else (SmoothedInt8Linear,)

    def observe(self, in_features: int, device: torch.device) -> LargestInputs:
        """The channel maxima that all linears with one input share."""
        return LargestInputs(in_features, device)

    def prepare(self, block: Observed[LargestInputs]) -> None:
        """Move the divisors of all inputs of a block into the layers that produce these inputs."""
        if self.fold:
            from knowledge_compression.compression.walk.folding import fold

            fold(block, lambda weight, seen, entry: self.divisor(weight, seen.largest, entry)[0])

    def solve(self, weight: Tensor, statistics: LargestInputs, heights: Sequence[int]) -> Solved:
        """Replace the linears by int8 layers that share one divisor."""
        if self.fold:
            return self._folded(statistics)
        from knowledge_compression.compression.formats.int8_variants import SmoothedInt8Linear

        divisor, dead = self.divisor(weight, statistics.largest)

        def module(layer: TargetLayer) -> SmoothedInt8Linear:
            return SmoothedInt8Linear(
                layer.weight, layer.bias_parameter, divisor.to(layer.weight.device), self.input_steps
            )

        return Solved(module=module, fallbacks=["dead_input"] * dead)

    def _folded(self, statistics: LargestInputs) -> Solved:
        from knowledge_compression.compression.formats.int8_linear import Int8Linear

        def module(layer: TargetLayer) -> Int8Linear:
            return Int8Linear(layer.weight, layer.bias_parameter, "per_channel", self.input_steps)

        fallbacks = ["no_place_for_factors"] * (statistics.factors is None)
        return Solved(module=module, fallbacks=fallbacks, factors_in=statistics.divided_by)

    def divisor(self, weight: Tensor, largest: Tensor, entry: Tensor | None = None) -> tuple[Tensor, bool]:
        """The divisor of each input channel.

        Args:
            weight: the stacked weights of all linears that read these inputs, ``[out_features, in_features]``.
            largest: the largest magnitude of each input channel, ``[in_features]``.
            entry: the index of each channel's divisor, int64 ``[in_features]``; by default each channel has its own.

        Returns:
            The divisors, float32 ``[in_features]`` or one more than the largest entry, and whether any channel is dead
            and so left undivided.
        """
        heaviest = weight.float().abs().amax(0)
        if entry is not None:
            zeros = heaviest.new_zeros(int(entry.max()) + 1)
            heaviest, largest = (zeros.scatter_reduce(0, entry, sizes, "amax") for sizes in (heaviest, largest))
        alive = (largest > 0) & (heaviest > 0)
        divisor = largest.pow(self.alpha) / heaviest.pow(1 - self.alpha)
        return torch.where(alive, divisor.clamp(min=1e-5), 1.0), not bool(alive.all())
