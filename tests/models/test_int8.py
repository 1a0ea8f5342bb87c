"""The int8 layer against torch's own dynamic quantization, a slow reference, and itself on other devices' paths."""

from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers.networks import TINY, logits_of, model_inputs
from knowledge_compression.compression.formats import int8_linear, int8_products
from knowledge_compression.compression.formats.granularity import GRANULARITIES
from knowledge_compression.compression.formats.int8_linear import (
    Int8Linear,
    quantize_tensor,
    quantize_tokens,
    quantize_weight,
)
from knowledge_compression.compression.formats.int8_products import (
    float_product,
    integer_product,
    scaled_product,
    suits_scaled_product,
)
from knowledge_compression.compression.formats.int8_variants import SmoothedInt8Linear, StaticInt8Linear
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.pipeline import Pipeline
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target, Targets, device
from knowledge_compression.models.device import Device, is_exact
from knowledge_compression.models.targets import is_linear

ALL = ["encoder_att", "decoder_self_att", "cross_att", "ff"]


def select(model: Model, *roles: str, final: bool = False) -> Targets:
    return Target("test", list(roles or ALL), final_when_quantized=final).select(model)


def random_linear(inputs: int, outputs: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias)


sizes = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 40))


@pytest.mark.parametrize("engine", [e for e in ("onednn", "x86") if e in torch.backends.quantized.supported_engines])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shift", "spread"), [(0, 1), (3, 1), (-3, 0.01), (0, 1000)])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 8, 8), (7, 33, 17), (64, 768, 100), (16, 3072, 50)])
def test_per_tensor_is_torchs_quantize_dynamic(
    engine: str, bias: bool, shift: float, spread: float, rows: int, inputs: int, outputs: int
) -> None:
    linear = random_linear(inputs, outputs, bias)
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
    try:
        theirs = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
        ours = Int8Linear.of(linear, "per_tensor")
        quantized = theirs[0].weight()
        assert torch.equal(ours.weight_int8, quantized.int_repr())
        assert float(ours.weight_scale) == pytest.approx(quantized.q_scale())
        inputs_ = torch.randn(rows, inputs) * spread + shift
        with torch.no_grad():
            expected, got = theirs(inputs_), ours(inputs_)
        # The same integers, but for an input that lies on the very edge between two (the engines differ there too).
        step = float(inputs_.max().clamp_min(0) - inputs_.min().clamp_max(0)) / 127 * float(linear.weight.abs().max())
        torch.testing.assert_close(got, expected, rtol=0, atol=1.01 * step)
        assert (got - expected).abs().le(1e-6 * expected.abs().max()).float().mean() > 0.9
    finally:
        torch.backends.quantized.engine = before


def test_integers_are_torchs_to_the_last_tie() -> None:
    """Torch multiplies by the reciprocal of the scale; a division settles some ties otherwise (25 in these layers)."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn" if "onednn" in torch.backends.quantized.supported_engines else engine
    try:
        for seed in range(60):
            linear = random_linear(512, 512, seed=seed)
            linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
            reference = torch.ao.nn.quantized.dynamic.Linear.from_float(linear).weight().int_repr()
            assert torch.equal(quantize_weight(linear.weight.detach(), "per_tensor")[0], reference), seed
    finally:
        torch.backends.quantized.engine = engine


def test_a_whole_model_is_that_of_quantize_dynamic(tiny_model: Callable[[str], Model]) -> None:
    model, reference = tiny_model("bert"), tiny_model("bert")
    dense = logits_of(model)
    Int8Dynamic("per_tensor").compress(model, select(model, *ALL, "transform", final=True), None)
    reference.untie_head()
    quantized = torch.ao.quantization.quantize_dynamic(reference.network, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        ours, theirs = logits_of(model), quantized(**model_inputs(model)).logits
    assert (ours - theirs).norm() < 0.5 * (theirs - dense).norm()  # one flipped integer moves a whole token
    assert (ours - theirs).abs().lt(1e-4).float().mean() > 0.9


@pytest.mark.parametrize("granularity", GRANULARITIES)
@settings(max_examples=40)
@given(size=sizes, seed=st.integers(0, 1000))
def test_forward_is_the_slow_reference(granularity: str, size: tuple[int, int, int], seed: int) -> None:
    rows, inputs, outputs = size
    linear = random_linear(inputs, outputs, seed=seed)
    x = torch.randn(rows, inputs)
    layer = Int8Linear.of(linear, granularity)
    if granularity == "per_tensor":
        integers, scale, zero_point = quantize_tensor(x)
        assert integers.min() >= 0 and 0 <= int(zero_point) <= 127
        rounded = (integers.double() - zero_point) * scale.double()
    else:
        integers, scale = quantize_tokens(x)
        assert integers.abs().max() <= 127
        rounded = integers.double() * scale.double()
    # rounding moves no input by more than half a step; a 7-bit range may clip one further half
    assert ((rounded - x).abs() <= scale * (1.01 if granularity == "per_tensor" else 0.51)).all()
    weight = layer.weight_int8.double() * layer.weight_scale.double()[:, None]
    expected = rounded @ weight.T + linear.bias.double()
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_input_steps_are_those_of_the_programs_that_have_them() -> None:
    """127.5 as compressed-tensors 0.20: a quotient, rounded to even, and clipped at 127."""
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)).numpy()
    x[0, :3] = np.abs(x[0]).max() * np.array([-2, 2, 1], dtype=np.float32)  # both ends of the range
    for steps in (127.0, 127.5):
        scale = np.abs(x).max(1, keepdims=True) / np.float32(steps)
        integers, scales = quantize_tokens(torch.from_numpy(x), steps)
        assert np.array_equal(scales.numpy(), scale)
        expected = np.clip(np.rint(x / scale), -128, 127)
        assert (integers.numpy() != expected).mean() <= 1e-3 * (steps == 127)  # there a product with the reciprocal
        assert (int(integers.min()), int(integers.max())) == (-128 if steps == 127.5 else -127, 127)


@pytest.mark.parametrize("make", [Int8Linear, partial(SmoothedInt8Linear, divisor=torch.ones(96))])
def test_a_layer_rounds_in_the_steps_that_it_was_given(make: Any) -> None:
    linear, x = random_linear(96, 8, bias=False), torch.randn(5, 96)
    layer = make(weight=linear.weight.data, bias=None, input_steps=127.5)
    integers, _ = quantize_tokens(x, 127.5)
    assert torch.equal(layer.round_inputs(x)[0], integers)
    again = type(layer).from_buffers(dict(layer.named_buffers()), None, **layer.settings)
    assert torch.equal(again(x), layer(x))
    assert not torch.equal(make(weight=linear.weight.data, bias=None)(x), layer(x))


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 3000), st.integers(1, 40), st.integers(0, 1000))
def test_integer_products_are_exact_on_every_path(rows: int, inner: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-128, 128, (rows, inner), dtype=torch.int8, generator=generator)
    right = torch.randint(-128, 128, (columns, inner), dtype=torch.int8, generator=generator)
    expected = left.long() @ right.long().T
    assert torch.equal(integer_product(left, right).long(), expected)
    assert torch.equal(float_product(left, right).long(), expected)


@pytest.mark.parametrize("product", [integer_product, float_product])
def test_the_largest_integers_do_not_overflow(product: Callable[..., torch.Tensor]) -> None:
    left, right = torch.full((2, 5000), -128, dtype=torch.int8), torch.full((3, 5000), -128, dtype=torch.int8)
    assert (product(left, right) == 128 * 128 * 5000).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_emulation_gives_the_same_bits(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Int8Linear.of(random_linear(300, 77), granularity), torch.randn(3, 11, 300)
    with torch.no_grad():
        real = layer(x)
        monkeypatch.setitem(Device.known, x.device, Device(x.device, int8_gain=0.0))
        assert torch.equal(layer(x), real)


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _exact(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left.float() @ right.float()).to(torch.int32)


def _saturating(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """As without VNNI: each pair of products is added in 16 bits."""
    pairs = torch.einsum("rip,cip->rci", left.float().unflatten(1, (-1, 2)), right.T.float().unflatten(1, (-1, 2)))
    return pairs.clamp(-(2**15), 2**15 - 1).sum(-1).to(torch.int32)


def _missing(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("not implemented for this device")


@pytest.mark.parametrize(
    ("product", "seconds", "used"),
    [(_exact, 0.5, True), (_exact, 2.0, False), (_saturating, 0.5, False), (_missing, 0.5, False)],
)
def test_integers_are_multiplied_as_such_where_that_is_right_and_faster(
    product: Product, seconds: float, used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processors without VNNI multiply int8 in slow loops, or fast and wrongly."""
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path))
    calls = []

    def counted(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        calls.append(left.shape)
        return product(left, right)

    def timed(_place: torch.device, work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        before = len(calls)
        found = work()
        return (seconds if len(calls) > before else 1.0), found

    monkeypatch.setattr(torch, "_int_mm", counted)
    monkeypatch.setattr(device, "timed", timed)
    cpu = torch.device("cpu")
    monkeypatch.setitem(Device.known, cpu, Device(cpu))
    assert Device.of(cpu).multiplies_int8_faster is used
    before = len(calls)
    left, right = torch.full((4, 8), 2, dtype=torch.int8), torch.full((3, 8), 5, dtype=torch.int8)
    assert (integer_product(left, right) == 80).all()
    assert (len(calls) > before) is used


def test_accelerators_use_their_integer_products_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "to", partialmethod(_stay, torch.Tensor.to))  # there is no GPU here
    monkeypatch.setattr(torch, "_int_mm", _exact)
    monkeypatch.setattr(device, "timed", lambda *_: pytest.fail("timed"))
    assert Device(torch.device("cuda")).multiplies_int8_faster
    monkeypatch.setattr(torch, "_int_mm", _missing)
    assert not Device(torch.device("cuda")).multiplies_int8_faster
    assert not Device(torch.device("meta")).multiplies_int8_faster


def _stay(tensor: torch.Tensor, move: Any, target: Any) -> torch.Tensor:
    moved: torch.Tensor = tensor if isinstance(target, torch.device) else move(tensor, target)
    return moved


@pytest.mark.parametrize("name", ["per_tensor", "per_channel", "static", "smoothed"])
@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 140), st.booleans(), st.integers(0, 1000))
def test_sums_scaled_by_onednn_have_the_same_bits(
    name: str, rows: int, inputs: int, outputs: int, bias: bool, seed: int
) -> None:
    """The fast way of processors with VNNI or AMX, at any number of rows, and the steps one by one."""
    inputs *= 64
    linear = random_linear(inputs, outputs, bias, seed)
    x = torch.randn(rows, inputs) * torch.logspace(-2, 2, rows)[:, None]
    weight, shift = linear.weight.data, linear.bias
    layer = {
        "per_tensor": lambda: Int8Linear(weight, shift, "per_tensor"),
        "per_channel": lambda: Int8Linear(weight, shift, "per_channel"),
        "static": lambda: StaticInt8Linear(weight, shift, "per_channel", x.amin().clamp_max(0), x.amax().clamp_min(0)),
        "smoothed": lambda: SmoothedInt8Linear(weight, shift, torch.linspace(0.5, 2, inputs)),
    }[name]()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(int8_linear, "suits_scaled_product", lambda _: False)
        expected = layer(x)
        patched.setattr(int8_linear, "suits_scaled_product", lambda _: True)
        patched.setattr(int8_linear, "scaled_product", counted := Mock(wraps=_scaled_product_here()))
        assert torch.equal(layer(x), expected) and counted.called


def _scaled_product_here() -> Callable[..., torch.Tensor]:
    """oneDNN's product, or its definition in float64 on a processor where oneDNN's is not exact."""
    if is_exact(lambda left, right: scaled_product(left, right, torch.ones(1), None), torch.device("cpu")):
        return scaled_product

    def defined(left: torch.Tensor, right: torch.Tensor, columns: torch.Tensor, zero: Any) -> torch.Tensor:
        return ((left.double() - (0 if zero is None else zero)) @ right.double().T).float() * columns

    return defined


@pytest.mark.parametrize(
    ("multiplies", "exact", "faster", "used"),
    [(4.0, True, 2.0, True), (4.0, True, 0.9, False), (4.0, False, 2.0, False), (0.5, True, 2.0, False)],
)
def test_many_rows_take_the_fast_way_where_it_is_exact_and_faster(
    multiplies: float, exact: bool, faster: float, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, few = torch.zeros(256, 64, dtype=torch.int8), torch.zeros(255, 64, dtype=torch.int8)
    monkeypatch.setattr(int8_products, "is_exact", lambda *_: exact)
    monkeypatch.setattr(int8_products, "gain_of", lambda *_: faster)
    monkeypatch.setattr(int8_products, "_scales_faster", int8_products._scales_faster.__wrapped__)  # not remembered
    monkeypatch.setitem(Device.known, many.device, Device(many.device, int8_gain=multiplies))
    assert suits_scaled_product(many) is used
    assert not suits_scaled_product(few) and not suits_scaled_product(many[:, :63])
    assert not suits_scaled_product(many.to("meta"))


def test_a_products_exactness_is_tried_with_the_largest_integers() -> None:
    cpu = torch.device("cpu")
    assert is_exact(lambda left, right: _exact(left, right.T), cpu)
    assert not is_exact(lambda left, right: _saturating(left, right.T), cpu)
    assert not is_exact(lambda left, right: _missing(left, right.T), cpu)


@settings(max_examples=40)
@given(sizes, st.integers(0, 1000))
def test_per_channel_does_not_depend_on_the_batch(size: tuple[int, int, int], seed: int) -> None:
    rows, inputs, outputs = size
    layer = Int8Linear.of(random_linear(inputs, outputs, seed=seed), "per_channel")
    x = torch.randn(rows, inputs)
    with torch.no_grad():
        together = layer(x)
        assert torch.equal(together[:1], layer(x[:1]))
        assert torch.equal(together, layer(torch.cat([x, 1000 * x]))[:rows])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_infinitesimals_and_empty_inputs(granularity: str) -> None:
    linear = random_linear(8, 5)
    with torch.no_grad():
        for x in (torch.zeros(3, 8), torch.full((3, 8), 1e-30)):
            torch.testing.assert_close(Int8Linear.of(linear, granularity)(x), linear.bias.expand(3, 5))
        linear.weight.zero_()
        torch.testing.assert_close(Int8Linear.of(linear, granularity)(torch.ones(2, 8)), linear.bias.expand(2, 5))
        assert Int8Linear.of(linear, granularity)(torch.zeros(0, 8)).shape == (0, 5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rounded_weights_lie_within_a_step_and_zeros_stay_zero(granularity: str) -> None:
    weight = random_linear(40, 30).weight.detach().clone()
    weight[:, ::3] = 0
    integers, scale = quantize_weight(weight, granularity)
    assert (integers[:, ::3] == 0).all()
    assert ((integers * scale[:, None] - weight).abs() <= 0.51 * scale[:, None]).all()
    assert scale.shape == (30,) if granularity == "per_channel" else (1,)


def test_it_stands_in_for_a_linear_layer() -> None:
    linear = random_linear(6, 4)
    layer = Int8Linear.of(linear)
    assert is_linear(layer) and layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (6, 4)
    assert "6, 4, bias=True, per_channel" in str(layer)
    assert layer.weight.shape == linear.weight.shape and layer.weight.dtype == linear.weight.dtype
    state = layer.state_dict()
    assert (
        set(state) == {"weight_int8", "weight_scale", "weight_sum", "bias"} and state["weight_int8"].dtype == torch.int8
    )
    other = Int8Linear.of(random_linear(6, 4, seed=1))
    other.load_state_dict(state)
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_loaded_state_brings_its_sums(granularity: str) -> None:
    layer, other = (Int8Linear.of(random_linear(6, 4, seed=s), granularity) for s in (0, 1))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6) + 1
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))


def test_conv1d_of_gpt2_is_turned() -> None:
    conv = Conv1D(5, 7)
    nn.init.normal_(conv.weight)
    layer, x = Int8Linear.of(conv, "per_channel"), torch.randn(2, 7)
    with torch.no_grad():
        assert layer.weight.shape == (5, 7)
        assert (layer(x) - conv(x)).abs().max() < 0.1


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_pass_to_the_input_and_only_there(granularity: str) -> None:
    layer = Int8Linear.of(random_linear(8, 5), granularity)
    x = torch.randn(2, 3, 8, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 3, 8))
    assert layer.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(tiny_model: Callable[[str], Model], dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    model.network.to(dtype)
    dense = logits_of(model).float()
    Int8Dynamic("per_channel").compress(model, select(model), None)
    logits = logits_of(model)
    assert logits.dtype == dtype and model.network.model.layers[0].mlp.up_proj.weight.dtype == dtype
    assert (logits.float() - dense).norm() < 0.1 * dense.norm()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_architecture_stays_close_and_its_int8_is_counted(any_tiny_model: Model, granularity: str) -> None:
    model = any_tiny_model
    dense, embeddings = logits_of(model), model.network.get_input_embeddings().weight.detach().clone()
    targets = select(model)
    weights = sum(layer.weight.numel() for layer in targets) + select(model, "final")[0].parameters
    was_tied = model.head_is_tied
    report = Int8Dynamic(granularity).compress(model, select(model, final=True), None)
    model.network.tie_weights()  # lm-eval's HFLM does this in its constructor

    logits = logits_of(model)
    assert 0 < (logits - dense).norm() < 0.1 * dense.norm()
    assert torch.equal(model.network.get_input_embeddings().weight, embeddings)
    assert all(isinstance(layer.module, Int8Linear) for layer in [*select(model), *select(model, "final")])
    assert report.parameters_touched == weights and report.bits == 8 and report.removed == 0
    scales = sum(layer.module.weight_scale.numel() for layer in [*select(model), *select(model, "final")])
    sums = report_rows(model)
    assert sum(layer.overhead_bits for layer in report.layers) == 32 * scales
    # a byte a weight instead of four, and the scales and sums of rows; untying the head came first
    assert report.model_bytes_after == report.model_bytes_before - 3 * weights + 4 * (scales + sums)
    assert report.model_parameters == sum(p.numel() for p in _fresh(model).parameters())
    assert was_tied == (model.network.config.model_type != "gpt_neox")


def report_rows(model: Model) -> int:
    return sum(layer.module.out_features for layer in [*select(model), *select(model, "final")])


def _fresh(model: Model) -> nn.Module:
    from helpers.networks import build_network

    return build_network(model.network.config.model_type)


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_prune_then_quantize_keeps_zeros_and_counts_masks(
    tiny_model: Callable[[str], Model], architecture: str
) -> None:
    model, pruned = tiny_model(architecture), tiny_model(architecture)
    Magnitude(0.4).compress(pruned, select(pruned), None)
    targets = select(model)
    report = Pipeline([Magnitude(0.4), Int8Dynamic("per_channel")]).compress(model, targets, None)
    for ours, theirs in zip(select(model), select(pruned), strict=True):
        assert (ours.module.weight_int8[theirs.weight == 0] == 0).all()
    parameters = sum(layer.parameters for layer in report.layers)
    assert report.method == "magnitude+int8_dynamic"
    assert report.removed == round(0.4 * parameters)  # masks, not the zeros that rounding adds
    assert report.bits == 8 and report.model_bytes_after < report.model_bytes_before
    assert report.stored_bytes < report.model_bytes_before - 3 * parameters + report.model_bytes_before * 0.1


def test_steps_run_in_order_and_an_empty_list_is_refused() -> None:
    with pytest.raises(BadInput, match="steps is empty"):
        Pipeline([])
    assert not Pipeline([Magnitude(0.1), Int8Dynamic()]).calibrated


def test_what_cannot_be_done_gets_one_line(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    with pytest.raises(BadInput, match="granularity=per_row does not exist; choose one of per_tensor, per_channel"):
        Int8Dynamic("per_row").compress(model, select(model), None)
    Int8Dynamic().compress(model, select(model), None)
    with pytest.raises(BadInput, match=r"model.layers.0.self_attn.q_proj is quantized already"):
        Magnitude(0.5).compress(model, select(model), None)
    with pytest.raises(BadInput, match=r"model.layers.0.self_attn.q_proj is quantized already"):
        Int8Dynamic().compress(model, select(model), None)


def test_int8_of_the_head_does_not_dilute_what_was_pruned(tiny_model):
    """``overall`` prunes the blocks and, as published, quantizes the head with them: 20 % of the blocks stay 20 %."""
    model = tiny_model("bert")
    roles = ("encoder_att", "ff")
    targets = Target("overall", list(roles), final_when_quantized=True).select(model)
    report = Pipeline([Magnitude(0.2), Int8Dynamic()]).compress(model, targets)
    blocks = sum(layer.parameters for layer in report.layers if layer.role in roles)
    assert blocks < sum(layer.parameters for layer in report.layers)  # the head is among them
    assert report.sparsity == pytest.approx(0.2, abs=1 / blocks) and report.removed == round(0.2 * blocks)
