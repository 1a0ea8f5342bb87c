"""Layers, targets and calibration windows for the tests of compressions."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.networks import SPECIAL, VOCABULARY
from knowledge_compression.models import Target
from knowledge_compression.models.families import ROLES

EVERYTHING = Target("everything", ROLES)
ALL = Target("all", ["encoder_att", "decoder_self_att", "cross_att", "ff"])


def windows(samples: int = 4, length: int = 12) -> torch.Tensor:
    return torch.randint(len(SPECIAL), VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


def weight_with_outliers(rows: int = 24, columns: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[torch.rand(rows, columns, generator=generator) > 0.99] *= 8
    return weight


def inputs_with_outliers(tokens: int = 200, columns: int = 64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs[:, ::13] *= 20
    return inputs


def random_layer(rows: int = 24, columns: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moments of correlated inputs with a few loud features."""
    generator = torch.Generator().manual_seed(seed)
    loud = torch.exp(torch.randn(columns, generator=generator))
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    inputs = inputs * loud
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / len(inputs)


def relative_error(weight: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor) -> float:
    """The definition, float64."""
    error, hessian = weight.double() - approximation.double(), hessian.double()
    return float(torch.trace(error @ hessian @ error.T) / torch.trace(weight.double() @ hessian @ weight.double().T))
