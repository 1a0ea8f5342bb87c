"""Bits or sparsity by what each layer's error does to the answers of the whole network."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from knowledge_compression.compression.allocation.sensitivity import Kept, Sensitivity, measured_errors
from knowledge_compression.compression.base import Layerwise, Method
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.heavy import torch
from knowledge_compression.models import Model, TargetLayer, Targets
from knowledge_compression.progress import shown

if TYPE_CHECKING:
    from torch import LongTensor

_NOISE = "noise"  # the name of the noise among the settings whose errors are measured
VERSION = 1  # raised whenever a change of the code changes the measurements


@dataclass(frozen=True, kw_only=True)
class Kl(Sensitivity):
    """Take the values with the least divergence (KL) of the whole network that their errors foretell.

    For small errors, the rise of a network's loss is linear in the squared errors of its layers (HIGGS, Malinovskii et
    al. 2025, theorem 1). The factor of each layer is measured: Gaussian noise is added to its weights, and the KL from
    the dense network's answers is divided by the relative output error that the noise makes. The harm of a value is
    this factor times the output error that the method makes with it, measured as ``allocation=sensitivity`` does.

    Attributes:
        noise: standard deviation of the noise, in units of the root mean square of the layer's weights.
        windows: how many windows of the calibration text the network reads for each layer.
    """

    noise: Annotated[float, Field(gt=0, le=1)] = 0.1
    windows: Annotated[int, Field(gt=0)] = 4
    name = "kl"

    def measure(
        self, at: Mapping[str, Method], model: Model, targets: Targets, calibration: LongTensor | None
    ) -> tuple[dict[str, Any], int]:
        """Errors by layer and value, and the nats of KL for each unit of error, by layer."""
        noise = Noise(self.noise)
        errors = measured_errors({**at, _NOISE: noise}, model, targets, calibration)
        assert calibration is not None  # measured_errors has refused its absence
        text: Any = calibration[: self.windows]
        nats = measured_nats(noise, model, targets, text)
        factors = {path: nats[path] / max(of_layer.pop(_NOISE), 1e-12) for path, of_layer in errors.items()}
        passes = 1 + len(targets)
        return {"errors": errors, "nats_by_error": factors}, calibration.numel() + passes * text.numel()

    def harms(self, measured: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
        """Nats of KL that the errors foretell."""
        factors = measured["nats_by_error"]
        return {
            path: {value: factors[path] * error for value, error in of_layer.items()}
            for path, of_layer in measured["errors"].items()
        }


@dataclass(frozen=True)
class Noise(Layerwise):
    """Add Gaussian noise, the same on every device; only used to measure.

    Attributes:
        size: standard deviation, in units of the root mean square of the layer's weights.
    """

    size: float
    name = _NOISE

    def shrink(self, layer: TargetLayer) -> LayerReport:
        """Add it in place."""
        generator = torch.Generator().manual_seed(zlib.crc32(layer.path.encode()))
        drawn = torch.randn(layer.weight.shape, generator=generator).to(layer.weight.device)
        weight = layer.weight.float()
        layer.weight.copy_(weight + self.size * weight.square().mean().sqrt() * drawn)
        return LayerReport.of(layer)


def measured_nats(noise: Noise, model: Model, targets: Targets, windows: LongTensor) -> dict[str, float]:
    """Mean KL(dense || noisy), nats a position, with noise in one layer at a time; the model is unchanged.

    Args:
        noise: what is added.
        model, targets: as in :meth:`Compression.compress`.
        windows: the text that the network reads, int64 ``[windows, length]``.
    """
    from knowledge_compression.compression.walk.answers import Answers
    from knowledge_compression.compression.walk.passes import batches, checked_windows, read_text

    kept = Kept.of([VERSION, _NOISE, noise.size], model, windows)
    parts = list(batches(checked_windows(model, windows), on_cpu=model.device.type == "cpu"))
    with torch.no_grad():
        dense = [Answers.of(read_text(model, part)) for part in parts]
        for layer in shown([one for one in targets if one.path not in kept.found], "noise"):
            weight = layer.weight.clone()
            noise.shrink(layer)
            by_part = [
                float(answers.divergence(read_text(model, part))) * len(part)
                for part, answers in zip(parts, dense, strict=True)
            ]
            layer.weight.copy_(weight)
            kept.add(layer.path, {"nats": max(sum(by_part) / len(windows), 0.0)})
    return {layer.path: kept.found[layer.path]["nats"] for layer in targets}
