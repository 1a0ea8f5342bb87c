"""What every compression method is: a dataclass with one method.

A method is one short file beside this one and one YAML under ``conf/compression/``; nothing is registered anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Protocol

import torch
from torch import LongTensor, Tensor, nn

from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.errors import BadInput
from knowledge_compression.memory import peak_memory
from knowledge_compression.models import Model, TargetLayer, Targets


class Compression(Protocol):
    """A way to make a model smaller.

    Attributes:
        calibrated: whether ``compress`` needs calibration text.
        layerwise: whether, without text, each layer is compressed by itself, so that a model can be streamed through.
    """

    calibrated: ClassVar[bool] = False

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None) -> CompressionReport:
        """Compress the target layers in place.

        Args:
            model: the model whose network is changed.
            targets: the layers to touch; nothing else changes, but a tied head is untied first if it is among them.
            calibration: token ids ``[samples, length]`` on the CPU where ``calibrated``, else None.

        Returns:
            What was touched and reached.

        Raises:
            BadInput: the settings do not fit these layers or this model.
        """
        ...


def stacked(layers: Sequence[TargetLayer]) -> Tensor:
    """The weights of layers that read the same inputs as one, ``[sum of out_features, in_features]``.

    That of a single layer is the layer's own and no copy: read it before the layer is written.
    """
    weights = [layer.weight for layer in layers]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def check_sparsity(sparsity: float) -> None:
    """Refuse a share of weights to remove that lies outside [0, 1)."""
    if not 0.0 <= sparsity < 1.0:
        raise BadInput(f"sparsity={sparsity} is not a share to remove; it must lie in [0, 1), e.g. sparsity=0.2")


@contextmanager
def reporting(method: str, model: Model, targets: Targets) -> Iterator[CompressionReport]:
    """Time a compression and take the model's size before and after; the body appends the layers.

    Unties the head if it is among the targets, so that no method can forget to.

    Raises:
        BadInput: a target has given way to a module of integers already, whose weight cannot be written.
    """
    report = CompressionReport(method=method, model_parameters=model.parameter_count())
    for layer in targets:
        if getattr(layer.module, "replaces_linear", False):
            raise BadInput(f"{layer.path} is quantized already; quantization comes last, after pruning")
    if any(layer.role == "final" for layer in targets):
        model.untie_head()
    report.model_bytes_before = memory_bytes(model.network)
    start = time.perf_counter()
    with peak_memory(model.device) as peak:
        yield report
    report.seconds = time.perf_counter() - start
    report.peak_memory = peak.bytes
    report.model_bytes_after = memory_bytes(model.network)


def memory_bytes(network: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers."""
    tensors = {t.data_ptr(): t for t in [*network.parameters(), *network.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())
