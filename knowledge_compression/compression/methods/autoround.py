"""AutoRound: codes and scales tuned block by block with signed gradients (SignRound, Cheng et al. 2024)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from knowledge_compression.building import Positive, Seed
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.solve.grid import QuantizedWeight, quantized_weight
from knowledge_compression.compression.solve.hessian import relative_errors
from knowledge_compression.compression.solve.tuned import TunedRounding
from knowledge_compression.compression.walk.statistics import WalkSettings
from knowledge_compression.compression.walk.tuning import Call, CompressedBlock, gradients_of
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_TRIED = 16_384  # tokens on which a block's error is measured before and after tuning
_SHARES = (1, 1 / 4, 1 / 16, 1 / 64)  # of the rates, one after the other until the error falls


@dataclass(frozen=True)
class AutoRound(Gptq):
    """Tune what GPTQ leaves of a block until its output is that of the uncompressed block in the uncompressed network.

    The published method begins with round-to-nearest and steps large enough to reach every neighbouring code. Here
    codes begin where GPTQ leaves them once refined, so that small steps are enough, which generalise better
    (``docs/calibrated-compression.md``). Layers outside the blocks stay as GPTQ leaves them. Where a block's error
    would not fall on the calibration text (at most 16,384 tokens of it), it is tuned again at smaller rates; if none
    helps, it keeps GPTQ's result.

    Attributes:
        steps: steps in each block; 0 leaves GPTQ's result.
        batch: tokens of a step at least; whole batches of the walk are drawn, each once before any is drawn again.
        rate: how far each weight's place on its grid moves in the first step, in steps of the grid; it falls linearly
            to zero, as does the next.
        scale_rate: how far each scale moves in the first step, relative to it.
        seed: of the order of the batches.
    """

    true_sequential: bool = field(default=False, kw_only=True)
    damping: float = field(default=0.03, kw_only=True)
    refine: Annotated[int, Field(ge=0)] = 3
    steps: Annotated[int, Field(ge=0)] = 80
    batch: Positive = 1024
    rate: Annotated[float, Field(gt=0, le=1)] = 0.001
    scale_rate: Annotated[float, Field(ge=0, le=1)] = 0.004
    seed: Seed = 0
    name = "autoround"

    def __post_init__(self) -> None:
        """Also refuse to tune what is compressed linear by linear."""
        super().__post_init__()
        if self.true_sequential:
            raise BadInput("compression=autoround tunes whole blocks; leave compression.true_sequential=false")

    @property
    def walk(self) -> WalkSettings:
        """GPTQ's, with every block tuned."""
        return replace(super().walk, tuned_tokens=self.steps * self.batch)

    def tune(self, block: CompressedBlock) -> None:
        """Tune the layers of a block together."""
        starts = {layer.path: _codes_of(quantized_weight(layer)) for layer in block.layers}
        tried = _first(block.calls, _TRIED)
        before = after = _error(tried)
        for share in _SHARES:
            tuned = self._tuned(block, starts, share)
            after = _error(tried)
            if after < before:
                break
            tuned = starts
            for layer in block.layers:
                layer.weight.copy_(starts[layer.path].dequantize())
        for layer in block.layers:
            tuned[layer.path].put_into(layer)
            if (moments := block.second_moments.get(layer.path)) is not None:
                (now,) = relative_errors(block.dense[layer.path].float(), [layer.weight], moments)
                block.reports[layer.path].error_after = now
        log.info("%s: error relative to its output %.3g, tuned %.3g", block.path, before, min(after, before))

    def _tuned(
        self, block: CompressedBlock, starts: Mapping[str, QuantizedWeight], share: float
    ) -> dict[str, QuantizedWeight]:
        """All steps, at this share of the rates; also leaves the result in the block."""
        roundings = {path: TunedRounding(start, block.dense[path]) for path, start in starts.items()}
        parameters = list({id(layer.parameter): layer.parameter for layer in block.layers}.values())
        with gradients_of(parameters):
            for step, drawn in enumerate(self._draws(block.calls)):
                left = share * (1 - step / self.steps)
                loss = torch.stack([_errors(call).sum() for call in drawn]).sum()
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                gradients = {id(p): gradient for p, gradient in zip(parameters, found, strict=True)}
                with torch.no_grad():
                    for layer in block.layers:
                        if (gradient := gradients[id(layer.parameter)]) is not None:
                            rounding = roundings[layer.path]
                            rounding.follow(layer.part_of(gradient), self.rate * left, self.scale_rate * left)
                            layer.weight.copy_(rounding.weight())
        return {path: rounding.quantized() for path, rounding in roundings.items()}

    def _draws(self, calls: Sequence[Call]) -> Iterator[list[Call]]:
        """The batches of each step."""
        generator = torch.Generator().manual_seed(self.seed)
        queue: list[int] = []
        for _ in range(self.steps):
            drawn: list[Call] = []
            while len(drawn) < len(calls) and sum(call.tokens for call in drawn) < self.batch:
                queue = queue or torch.randperm(len(calls), generator=generator).tolist()
                drawn.append(calls[queue.pop()])
            yield drawn


def _codes_of(weight: object) -> QuantizedWeight:
    assert isinstance(weight, QuantizedWeight)
    return weight


def _first(calls: Sequence[Call], tokens: int) -> list[Call]:
    """The first calls, of so many tokens together."""
    before = accumulate((call.tokens for call in calls), initial=0)
    return [call for call, so_far in zip(calls, before, strict=False) if so_far < tokens]


def _errors(call: Call) -> Tensor:
    """Mean square error of each token of the block's output relative to its mean square, as the next norm sees it."""
    wanted = call.wanted.float()
    size = wanted.square().mean(-1).clamp(min=1e-12)
    return (call.run().float() - wanted).square().mean(-1) / size


def _error(calls: Sequence[Call]) -> float:
    """Mean of :func:`_errors`."""
    return float(torch.cat([_errors(call).flatten() for call in calls]).mean())
