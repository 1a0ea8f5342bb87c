"""AWQ against a plain float64 reference, and through every family."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.layers import ALL, inputs_with_outliers, weight_with_outliers, windows
from helpers.networks import logits_of
from knowledge_compression.compression.methods.awq import Awq
from knowledge_compression.compression.solve.grid import Grid, plainly_rounded
from knowledge_compression.compression.walk.blocks import LayerInputs
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model


def awq_reference(weight: Tensor, inputs: Tensor, awq: Awq) -> float:
    """The least output error over the powers, in float64, from the inputs themselves."""
    w, x = weight.double(), inputs.double()
    sizes, least = x.abs().mean(0), math.inf
    for step in range(awq.steps):
        factors = sizes ** (step / awq.steps)
        factors = factors / (factors.max() * factors.min()).sqrt()
        read = plainly_rounded((w * factors).float(), awq.grid).dequantize().double() / factors
        least = min(least, float((x @ (read - w).T).square().mean()))
    return least


@pytest.mark.parametrize(("bits", "group"), [(3, None), (4, 16), (3, 32)])
def test_awq_finds_the_best_power(bits: int, group: int | None) -> None:
    weight, inputs, awq = weight_with_outliers(), inputs_with_outliers(), Awq(bits=bits, group_size=group)
    statistics = awq.observe(64, torch.device("cpu"))
    for part in inputs.split(64):
        statistics.update(LayerInputs(part))
    rounded = awq.rounded(weight, statistics.matrix, statistics.magnitudes)
    error = float((inputs.double() @ (rounded - weight).double().T).square().mean())
    assert error == pytest.approx(awq_reference(weight, inputs, awq), rel=1e-3)
    plain = plainly_rounded(weight, awq.grid).dequantize()
    assert error < 0.8 * float((inputs.double() @ (plain - weight).double().T).square().mean())


def test_awq_survives_dead_inputs() -> None:
    weight, inputs, awq = weight_with_outliers(), inputs_with_outliers(), Awq(group_size=16)
    for dead in (inputs * (torch.arange(64) != 5), inputs * 0):
        statistics = awq.observe(64, torch.device("cpu"))
        statistics.update(LayerInputs(dead))
        assert bool(awq.rounded(weight, statistics.matrix, statistics.magnitudes).isfinite().all())


@pytest.mark.parametrize("architecture", ["bert", "t5", "llama", "gpt2", "albert", "bart"])
def test_every_family(architecture: str, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model(architecture)
    before = logits_of(model)
    targets = ALL.select(model)
    report = Awq(group_size=16).compress(model, targets, windows(6, 16))
    assert {layer.path for layer in report.layers} == {layer.path for layer in targets}
    after = logits_of(model)
    assert 0 < (after - before).norm() < 0.5 * before.norm()
    # One power serves all that read the same inputs, so a single layer may lose a little.
    assert sum(r.error_after for r in report.layers) <= sum(r.error_before for r in report.layers)  # type: ignore[misc]
    assert not report.fallbacks


def test_bad_settings_are_one_line(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    for wrong, message in (
        ({"steps": 0}, "steps=0"),
        ({"bits": 5}, "bits=5"),
        ({"group_size": 40}, "group_size=40 does not divide the 16 inputs"),
    ):
        with pytest.raises(BadInput, match=message):
            Awq(**wrong).compress(model, ALL.select(model), windows(6, 16))
    with pytest.raises(BadInput, match="no calibration text"):
        Awq(group_size=None).compress(model, ALL.select(model), None)


def test_groups_that_do_not_divide_the_inputs_end_in_a_shorter_one(tiny_model) -> None:
    """As in smollm2, whose 576 inputs are no multiple of the shipped 128."""
    weight = torch.randn(5, 20)
    grid = Grid(4, 8)
    parts = [
        plainly_rounded(weight[:, part], Grid(4, None)).dequantize() for part in (slice(8), slice(8, 16), slice(16, 20))
    ]
    assert torch.equal(grid.nearest(weight), torch.cat(parts, dim=1))
    model = tiny_model("llama")
    report = Awq(group_size=12).compress(model, ALL.select(model), windows(6, 16))
    assert report.fallbacks["short_group"] > 0 and logits_of(model).isfinite().all()
