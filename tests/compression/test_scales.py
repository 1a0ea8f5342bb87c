"""Scales tuned together: the loss and the steps against plain definitions, and networks that come closer."""

from __future__ import annotations

import pytest
import torch

from helpers.layers import EVERYTHING, random_layer, windows
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.scales import Scales
from knowledge_compression.compression.solve.factors import TunedScales
from knowledge_compression.compression.solve.grid import Grid, plainly_rounded, quantized_weight
from knowledge_compression.compression.walk.answers import LIKELIEST, Answers
from knowledge_compression.compression.walk.passes import read_text
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model

FIRST = Gptq(3, group_size=8, forward_dtype="float32")
TUNED = {"steps": 8, "batch": 2, "rate": 0.02, "forward_dtype": "float32"}


def full_divergence(dense: torch.Tensor, here: torch.Tensor) -> float:
    """The definition over all words, float64."""
    p, q = dense.double().log_softmax(-1), here.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_few_words_are_all_of_them_and_many_are_at_most_as_far() -> None:
    draw = torch.Generator().manual_seed(0)
    for words in (40, 4 * LIKELIEST):
        dense = 3 * torch.randn(2, 5, words, generator=draw)
        here = dense + 0.3 * torch.randn(2, 5, words, generator=draw)
        found, full = float(Answers.of(dense).divergence(here)), full_divergence(dense, here)
        assert found == pytest.approx(full, rel=1e-4) if words <= LIKELIEST else 0.5 * full < found <= full


def test_steps_are_those_of_adam_on_the_factors() -> None:
    weight, hessian = random_layer(rows=6, columns=32)
    start = plainly_rounded(weight, Grid(3, 8, scale_bits=32))
    found = TunedScales(start, torch.device("cpu"))
    factors = torch.ones(6, 4, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([factors], lr=0.01, betas=(0.9, 0.95), eps=1e-30)
    codes = start.codes.double() - start.grid.zeros.double().repeat_interleave(8, 1)
    for _ in range(5):
        now = codes * (start.grid.scales.double() * factors).repeat_interleave(8, 1)
        error = now - weight.double()
        adam.zero_grad()
        (error @ hessian.double() * error).sum().backward()
        seen = found.quantized().dequantize()
        torch.testing.assert_close(seen.double(), now.detach(), rtol=1e-5, atol=1e-6)
        found.follow(found.gradient(seen, 2 * (seen - weight) @ hessian), 0.01)
        adam.step()
    torch.testing.assert_close(found.factors.double(), factors.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.quantized().codes, start.codes)


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5", "mixtral"])
def test_networks_come_closer_to_the_dense_one(tiny_model, architecture: str) -> None:
    model: Model = tiny_model(architecture)
    model.untie_head()  # which quantizing the head would do
    text = windows()
    asking = [parameter.requires_grad for parameter in model.network.parameters()]
    with torch.no_grad():
        dense = read_text(model, text)
    state = {name: values.clone() for name, values in model.network.state_dict().items()}

    def damage(method: Scales) -> tuple[float, list[torch.Tensor]]:
        model.network.load_state_dict(state)
        targets = EVERYTHING.select(model)
        report = method.compress(model, targets, text)
        assert report.method == "gptq+scales" and len(report.layers) == len(targets)
        with torch.no_grad():
            return full_divergence(dense, read_text(model, text)), [quantized_weight(x).codes for x in targets]

    before, codes = damage(Scales(FIRST, steps=0))
    after, same = damage(Scales(FIRST, **TUNED))
    assert after < 0.97 * before
    assert all(torch.equal(one, other) for one, other in zip(codes, same, strict=True))
    assert [parameter.requires_grad for parameter in model.network.parameters()] == asking
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_without_steps_it_is_what_comes_first_and_the_seed_decides(tiny_model) -> None:
    def weights(method) -> torch.Tensor:
        model = tiny_model("llama")
        method.compress(model, EVERYTHING.select(model), windows())
        return torch.cat([layer.weight.flatten() for layer in EVERYTHING.select(model)])

    assert torch.equal(weights(FIRST), weights(Scales(FIRST, steps=0)))
    one, again, other = (weights(Scales(FIRST, seed=seed, **TUNED)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_scales_stay_those_of_a_packed_checkpoint(tiny_model) -> None:
    model = tiny_model("llama")
    report = Scales(Rtn(4, group_size=8, scale_bits=16), **TUNED).compress(model, EVERYTHING.select(model), windows())
    for layer in EVERYTHING.select(model):
        kept = quantized_weight(layer)
        assert torch.equal(kept.grid.scales, kept.grid.scales.half().float())
        assert torch.equal(kept.dequantize(), layer.weight)
    assert {layer.error_after for layer in report.layers} == {None}


def test_what_leaves_no_codes_is_one_line() -> None:
    with pytest.raises(BadInput, match=r"compression\.first=magnitude leaves none; choose gptq, autoround"):
        Scales(Magnitude(0.5))
