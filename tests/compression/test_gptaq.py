"""GPTAQ against a slow float64 reference of its equations, and the uncompressed network beside the walk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from helpers.every_type import write_tiny
from helpers.layers import EVERYTHING, windows
from helpers.networks import logits_of
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.methods.gptaq import Gptaq, PairedInputs
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.walk.blocks import LayerInputs, Statistics, WalkSettings, compress_blocks
from knowledge_compression.models import Model, Target
from knowledge_compression.models.families import EXPERTS
from knowledge_compression.models.loading import LocalModel


def reference(method: Gptaq, weight: torch.Tensor, here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """The definition, column by column, float64: after each column is rounded, the later ones move by the least-squares
    solutions for its rounding error and for what its input lacks; the inverse of what is left is taken anew each time.
    """
    weight, here, there, n = weight.double().clone(), here.double(), there.double(), weight.shape[1]
    hessian = here.T @ here / len(here)
    lacks = (there - here).T @ here / len(here)
    importance = hessian.diagonal()
    order = torch.argsort(importance, descending=True, stable=True) if method.desc_act else torch.arange(n)
    damped = hessian + method.damping * importance.mean() * torch.eye(n)
    width, result = method.group_size or n, torch.zeros_like(weight)
    parts = [slice(start, start + width) for start in range(0, n, width)]
    fitted = [method.grid.fit(weight[:, part].float(), importance[part].float()) for part in parts]
    for step in range(n):
        column, left, later = int(order[step]), order[step:], order[step + 1 :]
        scales, zeros = fitted[column // width]
        was = weight[:, column].clone()
        result[:, column] = method.grid.round(was[:, None], scales.double(), zeros.double())[:, 0]
        inverse = torch.linalg.inv(damped[left][:, left])
        weight[:, later] -= ((was - result[:, column]) / inverse[0, 0])[:, None] * inverse[0, 1:]
        if len(later):
            moved = lacks[column, later] @ torch.linalg.inv(damped[later][:, later])
            weight[:, later] += method.alpha * was[:, None] * moved
    return result


@pytest.mark.parametrize("settings_", [{}, {"desc_act": False}, {"group_size": 16, "alpha": 1.0}, {"block_size": 8}])
def test_it_is_the_definition(settings_) -> None:
    draw = torch.Generator().manual_seed(3)
    there = torch.randn(200, 48, generator=draw) @ torch.randn(48, 48, generator=draw)
    here = there + 0.3 * torch.randn(200, 48, generator=draw) @ torch.randn(48, 48, generator=draw)
    weight = torch.randn(24, 48, generator=draw)
    method = Gptaq(3, **settings_)
    statistics = PairedInputs(48, torch.device("cpu"))
    for part in range(0, 200, 50):
        statistics.update(LayerInputs(here[part : part + 50], dense=there[part : part + 50]))
    found = method.solve(weight, statistics, [24]).quantized.dequantize().double()
    wanted = reference(method, weight, here, there)
    # a value next to the border between two codes may fall to either side
    assert (found - wanted).abs().gt(1e-3).float().mean() < 0.02

    def error(rounded):
        return float((here.double() @ rounded.T - there.double() @ weight.double().T).square().sum())

    assert error(found) == pytest.approx(error(wanted), rel=0.02)
    plain = Gptq(3, **{name: value for name, value in settings_.items() if name != "alpha"})
    assert error(found) < error(plain.solve(weight, statistics, [24]).quantized.dequantize().double())


@dataclass
class Pairs(Statistics):
    """All inputs of a layer, here and in the uncompressed network."""

    here: list[torch.Tensor] = field(default_factory=list)
    there: list[torch.Tensor] = field(default_factory=list)

    def update(self, inputs: LayerInputs) -> None:
        self.here.append(inputs.values.clone())
        if inputs.dense is not None:
            self.there.append(inputs.dense.clone())


@dataclass
class Scaling:
    """Scales every weight, and keeps what the layers read."""

    factor: float
    seen: dict[str, Pairs] = field(default_factory=dict)

    def observe(self, in_features: int, device: torch.device) -> Pairs:
        return Pairs()

    def prepare(self, block) -> None:
        pass

    def shrink(self, layers, statistics: Pairs) -> list[LayerReport]:
        for layer in layers:
            self.seen[layer.path] = statistics
            layer.weight.mul_(self.factor)
        return [LayerReport.of(layer) for layer in layers]


@pytest.mark.parametrize("in_sequence", [False, True])
def test_layers_are_told_what_they_read_in_the_uncompressed_network(any_tiny_model: Model, in_sequence) -> None:
    model = any_tiny_model
    model.untie_head()
    targets = EVERYTHING.select(model)
    if any(layer.uses > 1 for layer in targets):
        pytest.skip("a shared block is compressed before its later uses are run again")
    plain, method = Scaling(1.0), Scaling(0.7)
    compress_blocks(model, targets, windows(), plain, WalkSettings(in_sequence, forward_dtype="float32"))
    settings = WalkSettings(in_sequence, forward_dtype="float32", dense_inputs=True)
    compress_blocks(model, targets, windows(), method, settings)
    for layer in targets:
        if layer.role == EXPERTS:
            continue
        wanted, told = torch.cat(plain.seen[layer.path].here), torch.cat(method.seen[layer.path].there)
        torch.testing.assert_close(told, wanted, rtol=1e-4, atol=1e-5)
        if layer.path != next(iter(method.seen)) and layer.block:  # what it reads itself is something else by then
            assert not torch.allclose(torch.cat(method.seen[layer.path].here), wanted, rtol=1e-3)


def test_a_layer_that_runs_twice_is_paired_with_the_same_time(tmp_path: Path) -> None:
    """T5Gemma 2's keys and values read the text, then its encoder's states, which may be as many."""
    write_tiny("t5gemma2", tmp_path)
    model = LocalModel("local", str(tmp_path)).load("cpu", "float32")
    before = logits_of(model)
    targets = Target("att", ["decoder_self_att"]).select(model)
    Gptaq(8).compress(model, targets, torch.randint(5, 90, (8, 24), generator=torch.Generator().manual_seed(1)))
    assert (logits_of(model) - before).abs().max() < 0.05 * before.abs().max()
