"""Scales: those of a quantized model tuned together until it says what the dense one says (EfficientQAT, Chen 2024)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from knowledge_compression.building import Positive, Seed
from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.compression.methods.none import NoCompression
from knowledge_compression.compression.solve.coding import INTEGERS, Coding
from knowledge_compression.compression.solve.factors import TunedScales
from knowledge_compression.compression.solve.grid import QuantizedWeight, quantized_weight
from knowledge_compression.compression.walk.answers import Answers
from knowledge_compression.compression.walk.statistics import WalkSettings
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import Model, TargetLayer, Targets
from knowledge_compression.models.device import multiplied_in
from knowledge_compression.models.targets import linear_layers
from knowledge_compression.progress import shown

if TYPE_CHECKING:
    from torch import LongTensor, Tensor, nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scales(Compression):
    """Quantize, then tune all scales together: the whole network's answers, not each block's, come closer to the dense.

    As the second phase of EfficientQAT (Chen et al. 2024, section 3.3), with codes fixed: the loss is the divergence of
    the network's distributions on the calibration text from the dense network's, in which the likeliest words count one
    by one and all others together.

    Attributes:
        first: quantizes, to whole-number codes.
        steps: of tuning; 0 leaves what ``first`` gives.
        batch: windows of a step; each is drawn once before any is drawn again.
        rate: how far a scale moves in the first step at most, relative to it; it falls linearly to zero.
        forward_dtype: of the products, see :class:`~knowledge_compression.compression.calibrated.Calibrated`.
        seed: of the order of the windows.
    """

    first: Compression = field(default_factory=NoCompression)
    steps: Annotated[int, Field(ge=0)] = 64
    batch: Positive = 1
    rate: Annotated[float, Field(gt=0, le=0.5)] = 0.002
    forward_dtype: str = "auto"
    seed: Seed = 0
    calibrated = True
    streams = False  # the text goes through the whole network, forwards and backwards

    def __post_init__(self) -> None:
        """Refuse a first step that leaves no scales of whole-number codes."""
        if self.first.coding is None or self.first.coding.kind != INTEGERS:
            raise BadInput(
                f"compression=scales tunes the scales of whole-number codes, and compression.first={self.first.name} "
                "leaves none; choose gptq, autoround, gptaq or rtn, e.g. compression@compression.first=gptq"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        """``scales`` behind the name of what quantizes, e.g. ``gptq+scales``."""
        return f"{self.first.name}+scales"

    @property
    def takes_final(self) -> bool:  # type: ignore[override]
        """As the first step does."""
        return self.first.takes_final

    @property
    def beyond_targets(self) -> bool:  # type: ignore[override]
        """As the first step."""
        return self.first.beyond_targets

    @property
    def coding(self) -> Coding | None:
        """That of the first step."""
        return self.first.coding

    @property
    def parts(self) -> Sequence[Compression]:
        """Those of the first step, and itself."""
        return [*self.first.parts, self]

    def multiplies_in(self, model: Model) -> str | None:
        """The user's choice, as far as the device and the network's dtype allow."""
        return str(self._narrower(model) or model.dtype).removeprefix("torch.")

    def passes(self, windows: int, length: int) -> float:
        """Four for each window of a step: one dense, one quantized, and one backwards, which counts as two."""
        return 4.0 * self.steps * self.batch / windows

    def compress(self, model: Model, targets: Targets, calibration: LongTensor | None = None) -> CompressionReport:
        """Quantize the targets and tune what was quantized."""
        from knowledge_compression.compression.walk.passes import checked_windows, read_text

        windows, narrower = checked_windows(model, calibration), self._narrower(model)

        def said(window: int) -> Tensor:
            with multiplied_in(narrower, model.device):
                return read_text(model, windows[window : window + 1])

        start = time.perf_counter()
        drawn = [list(batch) for batch in self._draws(len(windows))]
        with torch.no_grad():
            wanted = {i: Answers.of(said(i)) for i in shown(sorted({i for batch in drawn for i in batch}), "reading")}
        read = time.perf_counter() - start
        report = self.first.compress(model, targets, calibration)
        start = time.perf_counter()
        paths = {layer.path for layer in report.layers}
        layers = [layer for layer in linear_layers(model) if layer.path in paths]
        losses = self._tune(model, layers, drawn, wanted, said)
        if part := len(losses) // 4:
            told = sum(losses[:part]) / part, sum(losses[-part:]) / part
            log.info(
                "divergence from the dense model: %.3g nats in the first quarter of steps, %.3g in the last", *told
            )
        for layer in report.layers:
            layer.error_before = layer.error_after = None  # they were of other scales
        return replace(report, method=self.name, seconds=report.seconds + read + time.perf_counter() - start)

    def _tune(
        self,
        model: Model,
        layers: Sequence[TargetLayer],
        drawn: Sequence[Sequence[int]],
        wanted: Mapping[int, Answers],
        said: Callable[[int], Tensor],
    ) -> list[float]:
        """Tune the layers' scales in place; return the divergence at each step."""
        starts = {layer.path: code for layer in layers if isinstance(code := quantized_weight(layer), QuantizedWeight)}
        tuned = {path: TunedScales(code, model.device) for path, code in starts.items()}
        layers = [layer for layer in layers if layer.path in tuned]
        found: dict[str, Tensor] = {}

        def take(parameter: nn.Parameter) -> None:
            for layer in layers:
                if layer.parameter is parameter and parameter.grad is not None:
                    gradient = tuned[layer.path].gradient(layer.weight, layer.part_of(parameter.grad))
                    found[layer.path] = found[layer.path] + gradient if layer.path in found else gradient
            parameter.grad = None

        losses = []
        parameters = list({id(layer.parameter): layer.parameter for layer in layers}.values())
        with _gradients_of(model.network, parameters, take):
            for step, batch in enumerate(shown(drawn, "tuning")):
                found.clear()
                parts = []
                for window in batch:
                    loss = wanted[window].divergence(said(window))
                    loss.backward()
                    parts.append(float(loss.detach()))
                losses.append(sum(parts) / len(parts))
                with torch.no_grad():
                    for layer in layers:
                        if layer.path in found:
                            scales = tuned[layer.path]
                            scales.follow(found[layer.path], self.rate * (1 - step / self.steps))
                            layer.weight.copy_(scales.quantized().dequantize())
        with torch.no_grad():
            for layer in layers:
                tuned[layer.path].quantized().put_into(layer)
        return losses

    def _draws(self, windows: int) -> Iterator[list[int]]:
        """The windows of each step."""
        generator = torch.Generator().manual_seed(self.seed)
        queue: list[int] = []
        for _ in range(self.steps):
            while len(queue) < self.batch:
                queue += torch.randperm(windows, generator=generator).tolist()
            batch, queue = queue[: self.batch], queue[self.batch :]
            yield batch

    def _narrower(self, model: Model) -> torch.dtype | None:
        return WalkSettings(forward_dtype=self.forward_dtype).multiplied_in(model)


@contextmanager
def _gradients_of(
    network: nn.Module, parameters: Sequence[nn.Parameter], take: Callable[[nn.Parameter], None]
) -> Iterator[None]:
    """Let a backward pass find the gradients of these parameters alone, and hand each over as soon as it is there."""
    before = {parameter: parameter.requires_grad for parameter in network.parameters()}
    network.requires_grad_(False)
    hooks = []
    for parameter in parameters:
        parameter.requires_grad_(True)
        hooks.append(parameter.register_post_accumulate_grad_hook(take))
    try:
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, was in before.items():
            parameter.requires_grad_(was)
