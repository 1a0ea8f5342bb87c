"""Wanda: against its definition, exact in its counts, and through every architecture."""

from __future__ import annotations

import pytest
import torch

from helpers.layers import EVERYTHING, windows
from knowledge_compression.compression.methods.wanda import InputPower, Wanda
from knowledge_compression.compression.walk.blocks import LayerInputs
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model


def test_each_row_keeps_its_largest_products() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(7, 20, generator=generator), torch.randn(33, 20, generator=generator)
    power = InputPower(20, torch.device("cpu"))
    for batch in inputs.split(10):
        power.update(LayerInputs(batch))
    mask = Wanda(sparsity=0.35).removes(weight, power.mean)
    norms = inputs.double().norm(dim=0)
    for row, goes in zip(weight.double(), mask, strict=True):
        scores = row.abs() * norms
        assert int(goes.sum()) == 7
        assert scores[goes].max() < scores[~goes].min()


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_patterns_are_exact(pattern: str) -> None:
    keep, of = map(int, pattern.split(":"))
    generator = torch.Generator().manual_seed(0)
    mask = Wanda(0.5, pattern).removes(torch.randn(6, 32, generator=generator), torch.rand(32, generator=generator))
    assert ((~mask).unflatten(1, (-1, of)).sum(-1) == keep).all()


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_wanda_on_every_architecture(any_tiny_model: Model, pattern: str | None) -> None:
    targets = EVERYTHING.select(any_tiny_model)
    before = {layer.path: layer.weight.clone() for layer in targets}
    report = Wanda(0.5, pattern).compress(any_tiny_model, targets, windows())
    assert report.sparsity == 0.5
    for layer in targets:
        kept = layer.weight != 0
        assert torch.equal(layer.weight[kept], before[layer.path][kept])
        assert (kept.sum(dim=1) == layer.weight.shape[1] // 2).all()


def test_a_dead_input_is_counted(tiny_model) -> None:
    model = tiny_model("llama")
    model.network.model.layers[1].mlp.up_proj.weight.data[3] = 0  # the third input of down_proj is always zero
    report = Wanda(0.5).compress(model, EVERYTHING.select(model), windows())
    assert report.fallbacks == {"dead_input": 1}


def test_bad_settings_are_refused(tiny_model) -> None:
    model = tiny_model("llama")
    for settings_, message in (({"sparsity": -0.1}, "sparsity"), ({"sparsity": 0.5, "pattern": "5:7"}, "5:7")):
        with pytest.raises(BadInput, match=message):
            Wanda(**settings_).compress(model, EVERYTHING.select(model), windows())
