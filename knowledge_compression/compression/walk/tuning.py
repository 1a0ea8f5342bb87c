"""The compressed block that a walk passes to a method that tunes whole blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.heavy import torch
from knowledge_compression.models.targets import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One batch of text at a block: how the compressed network calls the block, and the output that it should have.

    Attributes:
        run: calls the block in its current state on the outputs of the compressed blocks before it, and returns its
            output ``[..., hidden]``; in the context of the walk's forward passes.
        wanted: the output that the uncompressed block has in the uncompressed network, of the same shape.
    """

    run: Callable[[], Tensor]
    wanted: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens in the batch."""
        return self.wanted.numel() // self.wanted.shape[-1]


@dataclass(frozen=True)
class CompressedBlock:
    """A block whose layers have just been compressed.

    Attributes:
        path: its module path.
        layers: its compressed layers.
        dense: their weights before that, ``[out_features, in_features]`` in the network's dtype, by path.
        second_moments: second moments of each layer's inputs, ``[in_features, in_features]``, by path, if the method
            keeps them.
        reports: the report of each layer, by path.
        calls: all batches of the calibration text; for a block that is used several times, at each use.
    """

    path: str
    layers: Sequence[TargetLayer]
    dense: Mapping[str, Tensor]
    second_moments: Mapping[str, Tensor]
    reports: Mapping[str, LayerReport]
    calls: Sequence[Call]


@contextmanager
def gradients_of(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Enable gradients with respect to these parameters."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, was in zip(parameters, before, strict=True):
            parameter.requires_grad_(was)
