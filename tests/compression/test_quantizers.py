"""The quantizers beside GPTQ: each against a plain float64 reference, and through every family."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers.layers import ALL, inputs_with_outliers, weight_with_outliers, windows
from helpers.networks import logits_of
from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.formats.int8_variants import SmoothedInt8Linear, StaticInt8Linear
from knowledge_compression.compression.methods.hqq import Hqq
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.int8_static import InputRange, Int8Static
from knowledge_compression.compression.methods.nf4 import Nf4, levels
from knowledge_compression.compression.methods.smoothquant import SmoothQuant
from knowledge_compression.compression.solve.grid import Grid
from knowledge_compression.compression.walk.blocks import LayerInputs
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model

METHODS: dict[str, Compression] = {
    "smoothquant": SmoothQuant(),
    "int8_static": Int8Static(),
    "nf4": Nf4(),
    "hqq": Hqq(group_size=16),
}


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("architecture", ["bert", "t5", "llama", "gpt2", "albert", "bart"])
def test_every_family(method: str, architecture: str, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model(architecture)
    before = logits_of(model)
    embeddings = model.network.get_input_embeddings().weight.clone()
    targets = ALL.select(model)
    compression = METHODS[method]
    report = compression.compress(model, targets, windows(6, 16) if compression.calibrated else None)
    assert {layer.path for layer in report.layers} == {layer.path for layer in targets}
    after = logits_of(model)
    assert bool(after.isfinite().all())
    assert not torch.equal(after, before)
    assert (after - before).norm() < 0.5 * before.norm()
    assert torch.equal(model.network.get_input_embeddings().weight, embeddings)
    assert report.bits == (8.0 if "8" in method or method == "smoothquant" else 4.0)
    assert all(layer.bits < layer.stored_bits / layer.parameters < 32 for layer in report.layers)
    assert not report.fallbacks


@pytest.mark.parametrize("method", ["smoothquant", "int8_static"])
def test_no_text_is_one_line(method: str, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    with pytest.raises(BadInput, match="no calibration text"):
        METHODS[method].compress(model, ALL.select(model), None)


# ---- NF4


def test_the_levels_are_the_published_ones() -> None:
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    published += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    published += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941]
    published += [0.7229568362236023, 1.0]  # of bitsandbytes, in float32
    assert levels().tolist() == torch.tensor(published).tolist()


@given(rows=st.integers(1, 9), columns=st.integers(1, 70), block=st.sampled_from([1, 16, 64]), seed=st.integers(0, 99))
def test_nf4_takes_the_nearest_level_of_each_block(rows: int, columns: int, block: int, seed: int) -> None:
    weight = weight_with_outliers(rows, columns, seed)
    rounded = Nf4(block_size=block).rounded(weight)
    flat, grid = weight.double().flatten().tolist(), levels().double().tolist()
    expected = []
    for start in range(0, len(flat), block):
        scale = max(abs(w) for w in flat[start : start + block])
        expected += [
            min((level * scale for level in grid), key=lambda v, w=w: abs(v - w)) for w in flat[start : start + block]
        ]
    error, least = (
        (rounded.double().flatten() - weight.double().flatten()).abs(),
        torch.tensor(expected) - weight.double().flatten(),
    )
    assert torch.allclose(error, least.abs(), atol=1e-7)


def test_nf4_keeps_zeros_and_double_quantization_costs_little() -> None:
    weight = weight_with_outliers(64, 256)
    weight[::3] = 0
    plain, doubled = Nf4().rounded(weight), Nf4(double_quant=True).rounded(weight)
    assert bool((plain[::3] == 0).all() and (doubled[::3] == 0).all())
    assert not torch.equal(plain, doubled)
    assert (doubled - weight).norm() < 1.1 * (plain - weight).norm()
    assert Nf4(double_quant=True)._scale_bits(1024) < Nf4()._scale_bits(1024) / 3


# ---- HQQ


def test_hqq_follows_its_equations_step_by_step() -> None:
    """The solver in float64, one group at a time."""
    weight, solver = weight_with_outliers(3, 16).unflatten(1, (-1, 16)), Hqq(bits=3, group_size=16, iterations=1)
    rounded = solver.rounded(weight, Grid(3, 16))
    for row in range(3):
        w = weight[row, 0].double()
        scale = float(((w.max() - w.min()) / 7).half())
        zero = float(torch.tensor(-float(w.min()) / scale).half())
        read = [scale * (min(max(round(float(x) / scale + zero), 0), 7) - zero) for x in w]
        errors = [float(x) - r for x, r in zip(w, read, strict=True)]
        large = [math.copysign(max(abs(e) - abs(e) ** (0.7 - 1) / 10, 0), e) for e in errors]
        codes = [round(r / scale + zero) for r in read]
        moved = sum(q - (float(x) - g) / scale for q, x, g in zip(codes, w, large, strict=True)) / 16
        moved = float(torch.tensor(moved).half())
        final = [scale * (min(max(round(float(x) / scale + moved), 0), 7) - moved) for x in w]
        options = torch.tensor([read, final])
        assert min((options.double() - rounded[row, 0].double()).abs().amax(1).tolist()) < 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_has_less_error_than_plain_rounding(bits: int) -> None:
    weight = weight_with_outliers(64, 128)
    grid = Grid(bits, 64)
    groups = weight.unflatten(1, (-1, 64))
    plain = grid.round(groups, *grid.fit(groups)).flatten(1)
    fitted = Hqq(bits=bits).rounded(groups, grid).flatten(1)
    assert (fitted - weight).abs().mean() < (plain - weight).abs().mean()


def test_hqq_keeps_constant_groups() -> None:
    weight = torch.full((2, 1, 16), 0.25)
    assert torch.allclose(Hqq(group_size=16).rounded(weight, Grid(4, 16)), weight, atol=2e-3)


# ---- SmoothQuant and static int8


def test_smoothquant_follows_its_equation() -> None:
    weights, inputs, method = [weight_with_outliers(seed=s) for s in (0, 1)], inputs_with_outliers(), SmoothQuant(0.7)
    divisor, dead = method.divisor(torch.cat(weights), inputs.abs().amax(0))
    heaviest = torch.cat(weights).double().abs().amax(0)
    assert torch.allclose(divisor.double(), inputs.double().abs().amax(0) ** 0.7 / heaviest**0.3, rtol=1e-5)
    assert not dead

    layer = SmoothedInt8Linear(weights[0], None, divisor)
    scaled, sent = weights[0].double() * divisor.double(), inputs.double() / divisor.double()
    row_scales, token_scales = scaled.abs().amax(1, keepdim=True) / 127.5, sent.abs().amax(1, keepdim=True) / 127
    rounded = (scaled / row_scales).round().clamp(-128, 127) * row_scales
    expected = (sent / token_scales).round() * token_scales @ rounded.T
    assert (layer(inputs).double() - expected).norm() < 3e-3 * expected.norm()  # but for a few values halfway
    differs = (layer.weight.double() - rounded / divisor.double()).abs() > 1e-5
    assert differs.sum(1).max() <= 1  # a row's largest lies halfway between two integers


def test_smoothing_helps_where_channels_stick_out() -> None:
    linear = nn.Linear(64, 24, bias=False)
    linear.weight.data = weight_with_outliers()
    inputs = inputs_with_outliers()
    exact = inputs @ linear.weight.data.T
    ones, divisor = torch.ones(64), SmoothQuant().divisor(linear.weight.data, inputs.abs().amax(0))[0]
    errors = [(SmoothedInt8Linear(linear.weight.data, None, d)(inputs) - exact).norm() for d in (ones, divisor)]
    assert errors[1] < 0.7 * errors[0]


def test_smoothquant_leaves_dead_channels_alone() -> None:
    divisor, dead = SmoothQuant().divisor(torch.ones(2, 3), torch.tensor([1.0, 0.0, 4.0]))
    assert divisor.tolist() == [1.0, 1.0, 2.0]
    assert dead


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_static_int8_rounds_to_its_range(granularity: str) -> None:
    weight, inputs = weight_with_outliers(), inputs_with_outliers()
    seen = InputRange(torch.device("cpu"))
    for part in inputs.split(50):
        seen.update(LayerInputs(part))
    assert (float(seen.least), float(seen.greatest)) == (float(inputs.min()), float(inputs.max()))
    bias = nn.Parameter(torch.randn(24))
    layer = StaticInt8Linear(weight, bias, granularity, seen.least, seen.greatest)

    beyond = torch.cat([inputs, 3 * inputs[:5]])  # some lies outside the range
    scale = (inputs.double().max() - inputs.double().min()) / 127
    zero = (-inputs.double().min() / scale).round()
    read = ((beyond.double() / scale).round() + zero).clamp(0, 127).sub(zero) * scale
    expected = read @ layer.weight.double().T + bias.double()
    assert torch.allclose(layer(beyond).double(), expected, rtol=1e-3, atol=1e-2)
    alone = torch.cat([layer(row[None]) for row in beyond[:3]])
    assert torch.equal(alone, layer(beyond)[:3])  # a row's answer does not depend on its batch


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nf4(block_size=0), "block_size=0"),
        (lambda: Hqq(p=1.5), r"p=1.5.*\(0, 1\]"),
        (lambda: SmoothQuant(alpha=-0.1), r"alpha=-0.1.*\[0, 1\]"),
        (lambda: Int8Static(granularity="per_row"), "granularity=per_row"),
        (lambda: Int8Dynamic("per_channel", 128.0), "input_steps=128 is not 127.*or 127.5"),
        (lambda: Int8Dynamic(input_steps=127.5), "input_steps=127.5 belongs to compression.granularity=per_channel"),
        (lambda: SmoothQuant(input_steps=0.0), "input_steps=0 is not 127"),
    ],
)
def test_bad_settings_are_one_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()


def test_groups_must_divide(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    with pytest.raises(BadInput, match="group_size=10 does not divide the 16 inputs"):
        Hqq(group_size=10).compress(model, ALL.select(model), None)


def test_gradients_pass_through_static_and_smoothed_layers() -> None:
    weight, inputs = weight_with_outliers(), inputs_with_outliers().requires_grad_()
    seen = inputs.detach().abs().amax(0)
    divisor, _ = SmoothQuant().divisor(weight, seen)
    layers = (
        SmoothedInt8Linear(weight, None, divisor),
        StaticInt8Linear(weight, None, "per_channel", inputs.min().detach(), inputs.max().detach()),
    )
    for layer in layers:
        (gradient,) = torch.autograd.grad(layer(inputs).sum(), inputs)
        assert torch.allclose(gradient, layer.weight.sum(0).expand_as(gradient), rtol=1e-4, atol=1e-5)
