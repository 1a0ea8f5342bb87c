"""GPTAQ: GPTQ towards the layer's output in the uncompressed network (Li et al. 2025, GPTQv2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.solve.hessian import Hessian
from knowledge_compression.compression.walk.statistics import LayerInputs, WalkSettings
from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor


class PairedInputs(Hessian):
    """Second moments of a layer's inputs, and of what they lack of its inputs in the uncompressed network."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._lacks = torch.zeros(in_features, in_features, device=device)

    def update(self, inputs: LayerInputs) -> None:
        """Add a batch."""
        super().update(inputs)
        if inputs.dense is not None:
            values = inputs.values.float()
            weighted = values if inputs.influence is None else values * inputs.influence[:, None]
            self._lacks.addmm_((inputs.dense.float() - values).T, weighted)

    @property
    def lacking(self) -> Tensor:
        """``mean of (x' - x) xᵀ``, float32 ``[in_features, in_features]``, with ``x'`` of the uncompressed network."""
        return self._lacks / (self._weight or 1.0)


@dataclass(frozen=True)
class Gptaq(Gptq):
    """Quantize as GPTQ does, and let the later columns also make up for what the inputs lack (asymmetric calibration).

    GPTQ keeps a layer's output on the inputs that the compressed layers before it give, and so keeps their errors. Here
    the target is the output on the inputs of the uncompressed network, beside which the text is run: the residual
    ``w (x' - x)`` of each column is compensated for by the columns after it, like its rounding error. Experts are
    quantized as by GPTQ, as the router may send other tokens to them than in the uncompressed network.

    Attributes:
        alpha: share of that residual which is compensated for; 1 is the paper's equation, its code takes 0.25.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.25
    name = "gptaq"

    @property
    def walk(self) -> WalkSettings:
        """GPTQ's, with the inputs in the uncompressed network."""
        return replace(super().walk, dense_inputs=True)

    def observe(self, in_features: int, device: torch.device) -> PairedInputs:
        """The statistics that all linears with one input share."""
        return PairedInputs(in_features, device)

    def lacking(self, statistics: Hessian) -> Tensor:
        """The chosen share of what the inputs lack."""
        assert isinstance(statistics, PairedInputs)
        return statistics.lacking.mul_(self.alpha)
