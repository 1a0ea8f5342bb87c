"""GPTQ and plain rounding: against slow float64 references, and through every architecture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.layers import EVERYTHING, random_layer, relative_error, windows
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.compression.solve.compensation import compensate
from knowledge_compression.compression.solve.grid import FittedGrid, Grid, plainly_rounded, quantized_weight
from knowledge_compression.compression.solve.hessian import Hessian, inverse_factor, relative_errors
from knowledge_compression.compression.walk.blocks import LayerInputs
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, TargetLayer


def gptq_reference(method: Gptq, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Optimal Brain Quantization in the definition's own words, float64: after each column the inverse of what is left
    is taken anew, and every later column moves at once."""
    weight, n = weight.double().clone(), weight.shape[1]
    importance = hessian.diagonal()
    order = torch.argsort(importance, descending=True, stable=True) if method.desc_act else torch.arange(n)
    damped = hessian.double() + method.damping * importance.double().mean() * torch.eye(n)
    width, grid = method.group_size or n, method.grid
    fitted = {}
    if method.static_groups or method.group_size is None:
        for start in range(0, n, width):
            part = slice(start, start + width)
            fitted[start // width] = grid.fit(weight[:, part].float(), importance[part])
    result = torch.zeros_like(weight)
    for step in range(n):
        column, left = int(order[step]), order[step:]
        if method.static_groups or method.group_size is None:
            group = column // width
        else:
            group = step // width
            if step % width == 0:
                members = order[step : step + width]
                fitted[group] = grid.fit(weight[:, members].float(), importance[members])
        scales, zeros = fitted[group]
        result[:, column] = grid.round(weight[:, [column]], scales.double(), zeros.double())[:, 0]
        inverse = torch.linalg.inv(damped[left][:, left])
        error = (weight[:, column] - result[:, column]) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0]
    return result


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"desc_act": False},
        {"group_size": 16},
        {"group_size": 16, "static_groups": False},
        {"group_size": 16, "static_groups": False, "desc_act": False},
        {"block_size": 7, "group_size": 32},
        {"group_size": 24},  # the last of 16
        {"group_size": 24, "static_groups": False},
    ],
)
def test_gptq_is_optimal_brain_quantization(settings_, symmetric, clip) -> None:
    method = Gptq(bits=3, symmetric=symmetric, clip=clip, **settings_)
    weight, hessian = random_layer()
    quantized, damping, fallbacks = method.quantize(weight, hessian)
    expected = gptq_reference(method, weight, hessian)
    assert (damping, fallbacks) == (0.01, [])
    # The same but where float32 and float64 fall on two sides of a tie, which then moves what comes after.
    same = (quantized.dequantize() - expected).abs() < 1e-4 * weight.abs().max()
    assert same.all(dim=1).float().mean() > 0.9
    assert relative_error(weight, quantized.dequantize(), hessian) == pytest.approx(
        relative_error(weight, expected, hessian), rel=0.02
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 32])
def test_gptq_errs_less_than_rounding(bits: int, group_size: int | None) -> None:
    weight, hessian = random_layer(seed=bits)
    for clip in ("minmax", "mse"):
        quantized, _, _ = Gptq(bits=bits, group_size=group_size, clip=clip).quantize(weight, hessian)
        plain = plainly_rounded(weight, Grid(bits, group_size, clip=clip))
        after, before = (relative_error(weight, q.dequantize(), hessian) for q in (quantized, plain))
        assert after < 0.8 * before


def test_the_inverse_factor_is_that_of_the_damped_hessian() -> None:
    _, hessian = random_layer()
    factor = inverse_factor(hessian, 0.01)
    assert factor is not None
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    upper = factor.upper.double()
    assert torch.equal(upper.triu(), upper) and torch.equal(upper.diagonal(), torch.ones(64).double())
    inverse = upper.T @ factor.pivots.double().diag() @ upper
    torch.testing.assert_close(inverse, torch.linalg.inv(damped), rtol=1e-3, atol=1e-6)


def test_a_dead_input_keeps_its_rounded_weight_and_is_counted() -> None:
    weight, hessian = random_layer()
    hessian[5] = hessian[:, 5] = 0
    quantized, _, fallbacks = Gptq(bits=4).quantize(weight, hessian)
    assert fallbacks == ["dead_input"]
    assert (quantized.dequantize()[:, 5] - weight[:, 5]).abs().max() < 0.5
    assert quantized.dequantize().isfinite().all()


def test_the_damping_ladder_is_climbed_and_counted() -> None:
    weight, hessian = random_layer()
    vectors = torch.linalg.qr(hessian).Q
    hessian = vectors * torch.tensor([-0.05, *[1.0] * 63]) @ vectors.T  # the first step of the ladder is not enough
    quantized, damping, fallbacks = Gptq(bits=4).quantize(weight, hessian)
    assert damping == pytest.approx(0.1)
    assert fallbacks == ["damping_raised"]
    assert quantized.dequantize().isfinite().all()


def test_a_hopeless_hessian_means_plain_rounding() -> None:
    weight, hessian = random_layer()
    method = Gptq(bits=4)
    quantized, damping, fallbacks = method.quantize(weight, -1e3 * hessian)
    assert (damping, fallbacks) == (None, ["not_positive_definite"])
    assert torch.equal(quantized.codes, plainly_rounded(weight, method.grid).codes)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    clip=st.sampled_from(["minmax", "mse"]),
    scale_bits=st.sampled_from([16, 32]),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_grids_hold_zero_and_round_to_the_nearest_point(bits, symmetric, clip, scale_bits, scale, seed) -> None:
    weight = scale * torch.randn(5, 48, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    quantized = plainly_rounded(weight, Grid(bits, 16, symmetric, clip, scale_bits))
    if scale_bits == 16:  # as a packed checkpoint stores them
        assert torch.equal(quantized.grid.scales.half().float(), quantized.grid.scales)
    assert quantized.grid.overhead_bits == 5 * 3 * (scale_bits + (0 if symmetric else bits))
    assert int(quantized.codes.max()) < 2**bits
    assert torch.equal(quantized.dequantize()[0], torch.zeros(48))
    every = torch.arange(2**bits)
    points = quantized.grid.scales[..., None] * (every - quantized.grid.zeros[..., None].float())
    distance = (weight.unflatten(1, (-1, 16))[..., None] - points[:, :, None]).abs().amin(-1).flatten(1)
    ours = (quantized.dequantize() - weight).abs()
    torch.testing.assert_close(ours, distance, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    scale_bits=st.sampled_from([16, 32]),
    scale=st.floats(1e-7, 10),
    seed=st.integers(0, 99),
)
@settings(max_examples=50)
def test_the_integers_behind_a_weight_of_any_type_are_found(dtype, bits, symmetric, scale_bits, scale, seed) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(48, 5, bias=False, dtype=dtype))
    layer = TargetLayer("0", "ff", network)
    weight = scale * torch.rand(5, 48, generator=torch.Generator().manual_seed(seed))  # zero points of 0, codes to 255
    quantized = plainly_rounded(weight, Grid(bits, 16, symmetric, scale_bits=scale_bits))
    quantized.put_into(layer)
    found = quantized_weight(layer)
    assert found is not None and torch.equal(found.codes, quantized.codes)
    if dtype == torch.float32:  # the codes are as large as a quarter of the weight
        assert isinstance(layer.module.__dict__["quantized_weight"], FittedGrid)


def test_rtn_is_the_published_rounding(tiny_model) -> None:
    model = tiny_model("llama")
    targets = EVERYTHING.select(model)
    dense = [layer.weight.clone() for layer in targets]
    Rtn(3).compress(model, targets, None)
    for layer, weight in zip(targets, dense, strict=True):
        low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / 7
        zero = torch.round(-low / scale)
        assert torch.equal(layer.weight, scale * (torch.clamp(torch.round(weight / scale) + zero, 0, 7) - zero))
    with pytest.raises(BadInput, match=r"compression\.scale_bits=8 is not a width of scales; choose 16 or 32"):
        Rtn(3, scale_bits=8).compress(model, targets, None)


def test_a_short_last_group_is_rounded_as_one_of_its_own(tiny_model) -> None:
    weight, _ = random_layer()
    quantized = plainly_rounded(weight, Grid(3, 24, clip="mse"), importance := torch.arange(1.0, 65.0))
    assert quantized.grid.scales.shape == (24, 3)
    for start in (0, 24, 48):
        part = slice(start, start + 24)
        alone = plainly_rounded(weight[:, part], Grid(3, clip="mse"), importance[part])
        assert torch.equal(quantized.codes[:, part], alone.codes)
    model = tiny_model("llama")  # 16 inputs, and 32 of one layer
    targets = EVERYTHING.select(model)
    for method in (Rtn(4, 10), Gptq(4, 10), SparseGpt(0.5, bits=4, group_size=10)):
        report = method.compress(model, targets, windows())
        assert report.fallbacks == {"short_group": len(targets)}
        kept = quantized_weight(targets[0])
        assert kept is not None
        assert kept.grid.group_of.bincount().tolist() == [10, 6]


def test_mse_clipping_rounds_better() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        (plainly_rounded(weight, Grid(3, clip=clip)).dequantize() - weight).square().mean()
        for clip in ("minmax", "mse")
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("settings_", [{}, {"group_size": 8, "static_groups": False}, {"true_sequential": False}])
def test_gptq_on_every_architecture(any_tiny_model: Model, settings_) -> None:
    targets = EVERYTHING.select(any_tiny_model)
    report = Gptq(bits=3, **settings_).compress(any_tiny_model, targets, windows(8, 32))
    assert sorted(layer.path for layer in report.layers) == sorted(layer.path for layer in targets)
    for layer in targets:
        kept = quantized_weight(layer)
        assert kept is not None
        assert torch.equal(kept.dequantize(), layer.weight)
    assert report.bits == 3
    assert all(layer.overhead_bits >= 19 for layer in report.layers)
    errors = [(layer.error_after, layer.error_before) for layer in report.layers]
    assert sum(after for after, _ in errors) < 0.8 * sum(before for _, before in errors)


def test_gptq_is_deterministic(tiny_model) -> None:
    def weights():
        model = tiny_model("llama")
        Gptq(bits=4).compress(model, EVERYTHING.select(model), windows())
        return model.network.state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scale_bits", [16, 32])
def test_rounding_reports_its_bits(scale_bits, tiny_model) -> None:
    model = tiny_model("gpt2")
    targets = EVERYTHING.select(model)
    before = {layer.path: layer.weight.clone() for layer in targets}
    report = Rtn(bits=4, group_size=8, scale_bits=scale_bits).compress(model, targets, None)
    assert report.bits == 4
    assert all(layer.overhead_bits == layer.parameters // 8 * (scale_bits + 4) for layer in report.layers)
    for layer in targets:
        assert (layer.weight - before[layer.path]).abs().max() < 0.2
        assert len(layer.weight[0].unique()) <= 16 * (layer.weight.shape[1] // 8)


def test_codes_are_not_given_for_a_weight_that_was_changed_since(tiny_model) -> None:
    model = tiny_model("llama")
    targets = EVERYTHING.select(model)
    Rtn(bits=4).compress(model, targets, None)
    targets[0].weight[0, 0] += 1
    assert quantized_weight(targets[0]) is None
    assert quantized_weight(targets[1]) is not None


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"group_size": 17}, "does not divide"),
        ({"clip": "max"}, "clip=max"),
        ({"group_size": 0}, "group_size=0"),
        ({"damping": -1.0}, "damping"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_touched(tiny_model, settings_, message) -> None:
    model = tiny_model("llama")
    before = model.network.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    with pytest.raises(BadInput, match=message):
        Gptq(**settings_).compress(model, EVERYTHING.select(model), windows())
    assert torch.equal(before, model.network.state_dict()["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize(("unit", "block_size"), [(1, 128), (4, 128), (16, 16), (24, 50), (64, 128)])
def test_columns_hear_of_all_errors_before_them_and_are_prepared_then(unit: int, block_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(90, 5, generator=generator)
    upper = torch.randn(90, 90, generator=generator).mul(0.1).triu(1) + torch.eye(90)
    expected, prepared = columns.double(), {}
    for i in range(90):
        if i % unit == 0:
            prepared[i, min(i + unit, 90)] = expected[i : i + unit].clone()
        error = expected[i] - expected[i].round()
        expected[i] = expected[i].round()
        expected[i + 1 :] -= upper[i, i + 1 :, None] * error
    seen = {}

    def prepare(start: int, end: int) -> None:
        seen[start, end] = columns[start:end].clone()

    compensate(columns, upper, lambda _, column: column.round(), prepare=prepare, unit=unit, block_size=block_size)
    torch.testing.assert_close(columns.double(), expected)
    assert list(seen) == list(prepared)
    for span, values in prepared.items():
        torch.testing.assert_close(seen[span].double(), values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("influence", [False, True])
@pytest.mark.parametrize("narrower", [None, torch.bfloat16])
@settings(max_examples=15)
@given(st.integers(1, 400), st.integers(1, 300), st.integers(0, 1000))
def test_second_moments_are_of_what_the_layer_multiplies(
    influence: bool, narrower: torch.dtype | None, tokens: int, width: int, seed: int
) -> None:
    """In passes of bfloat16 the layer rounds its inputs; the units that multiply them round nothing else."""
    values = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    by = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) + 0.1 if influence else None
    hessian, before = Hessian(width, torch.device("cpu")), torch.backends.mkldnn.matmul.fp32_precision
    hessian.update(LayerInputs(values, by, narrower=narrower))
    hessian.update(LayerInputs(values, by, narrower=narrower))
    assert torch.backends.mkldnn.matmul.fp32_precision == before

    seen = values.to(narrower or values.dtype).double()
    weights = torch.ones(tokens, dtype=torch.float64) if by is None else by.double()
    expected = (seen * weights[:, None]).T @ seen / weights.sum()
    assert float((hessian.matrix - expected).norm() / expected.norm()) < 2e-6


def test_hessians_are_means_of_outer_products() -> None:
    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(6, torch.device("cpu"))
    for batch in inputs.split(13):
        hessian.update(LayerInputs(batch))
    torch.testing.assert_close(hessian.matrix, inputs.T @ inputs / 50)
    with pytest.raises(RuntimeError, match="already been turned into their mean"):
        hessian.update(LayerInputs(inputs))


def test_hessians_may_be_weighted_by_influence() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, influence = torch.randn(50, 7, generator=generator), torch.rand(50, generator=generator)
    hessian = Hessian(7, torch.device("cpu"))
    for values, weights in zip(inputs.split(20), influence.split(20), strict=True):
        hessian.update(LayerInputs(values, weights))
    expected = torch.einsum("t,ti,tj->ij", influence, inputs, inputs) / influence.sum()
    torch.testing.assert_close(hessian.matrix, expected)
    assert torch.equal(hessian.matrix, hessian.matrix.T)


def test_relative_errors_follow_their_definition() -> None:
    weight, hessian = random_layer()
    others = [weight.round(), weight * 0.9, torch.zeros_like(weight)]
    expected = [relative_error(weight, other, hessian) for other in others]
    assert relative_errors(weight, others, hessian) == pytest.approx(expected, rel=1e-3)
    assert expected[1:] == pytest.approx([0.01, 1.0])
