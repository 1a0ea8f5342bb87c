"""The calibration text in the uncompressed network, run block by block beside the compressed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from knowledge_compression.compression.walk.layer_inputs import reading
from knowledge_compression.models.targets import TargetLayer


@dataclass(frozen=True)
class Beside:
    """The inputs and output of one batch of text in the uncompressed network.

    Attributes:
        inputs: what each layer of the block reads, by path; empty unless requested. Experts are absent: the router may
            send other tokens to them than in the compressed network, so that the two cannot be paired.
        output: the block's output, ``[..., hidden]``.
    """

    inputs: Mapping[str, Tensor]
    output: Tensor

    def of(self, path: str, values: Tensor) -> Tensor | None:
        """The layer's uncompressed inputs at the tokens of ``values``; None if the two cannot be paired."""
        dense = self.inputs.get(path)
        return dense if dense is not None and dense.shape == values.shape else None


def hidden_of(result: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of several."""
    hidden: Tensor = result[0] if isinstance(result, tuple) else result
    return hidden


def beside(layers: Mapping[str, TargetLayer], run: Callable[[], Any], *, inputs: bool) -> tuple[Beside, Any]:
    """Run the uncompressed block on one batch.

    Args:
        layers: its layers, by path.
        run: calls the block and returns its output.
        inputs: whether to keep the inputs of the layers too.

    Returns:
        The kept inputs and output, and the block's output itself.
    """
    results: list[Any] = []

    def kept() -> Any:
        results.append(run())
        return results[0]

    single = {path: layer for path, layer in layers.items() if inputs and not layer.expert}
    read, _ = reading(single, kept)
    return Beside(read, hidden_of(results[0])), results[0]
