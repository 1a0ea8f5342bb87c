"""FP8, MXFP4 and NVFP4, against plain references: every number that a format has, and the nearest of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from helpers.networks import build_network, logits_of
from helpers.stored_layers import E4M3, FP4
from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.kept import _restore, _write
from knowledge_compression.compression.methods.fp8 import Fp8
from knowledge_compression.compression.methods.mxfp4 import Mxfp4
from knowledge_compression.compression.methods.nvfp4 import Nvfp4
from knowledge_compression.compression.solve.floats import fp8, mxfp4, nvfp4, rounded_tokens
from knowledge_compression.compression.solve.grid import quantized_weight
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target

F32 = np.float32
FF = Target("ff", ["ff"])

# Any finite float32, subnormal ones and zeros included, but for the largest, which no quotient may leave.
finite = st.floats(width=32, min_value=-(2.0**120), max_value=2.0**120, allow_subnormal=True)
numbers = st.one_of(finite, st.sampled_from([0.0, -0.0, 1.0, -1.75, 2.5, 5.0, 7.0, 2.0**-140]))
matrices = st.tuples(st.integers(1, 5), st.integers(1, 70)).flatmap(
    lambda shape: arrays.arrays(F32, shape, elements=numbers)
)


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The nearest numbers of a format, an even code of two that are as near; magnitudes beyond the largest become it.

    Differences are taken in float64, in which those that could be equal are exact.
    """
    sizes = table[: len(table) // 2].astype(np.float64)
    away = np.abs(np.abs(values.astype(np.float64))[..., None] - sizes)
    odd = np.arange(len(sizes)) % 2
    tied = away == np.nanmin(away, axis=-1, keepdims=True)
    return np.copysign(sizes[np.argmin(np.where(tied, odd, 2), axis=-1)], values).astype(F32)


def blocks(shape: tuple[int, int], rows: int, columns: int) -> list[tuple[slice, slice]]:
    return [
        (slice(i, i + rows), slice(j, j + columns))
        for i, j in itertools.product(range(0, shape[0], rows), range(0, shape[1], columns))
    ]


def rounded(weight: np.ndarray, block: tuple[int, int], table: np.ndarray, scale: Callable[[F32], F32]) -> np.ndarray:
    """Each block over its scale, rounded to the format's numbers, times its scale, all in float32."""
    result = np.zeros_like(weight)
    for place in blocks(weight.shape, *block):
        part = weight[place]
        one = scale(np.abs(part).max())
        result[place] = nearest(part / one, table) * one
    return result


@given(weight=matrices, kind=st.sampled_from(["channel", "tensor", "block"]), size=st.integers(1, 40))
def test_fp8(weight: np.ndarray, kind: str, size: int) -> None:
    method = Fp8(granularity=kind, block_size=size)  # type: ignore[arg-type]
    block = {"channel": (1, weight.shape[1]), "tensor": weight.shape}.get(kind, (size, size))
    with np.errstate(all="ignore"):
        wanted = rounded(weight, block, E4M3, lambda most: most / F32(448) or F32(2.0**-23))
    assert np.array_equal(fp8(torch.from_numpy(weight), method.block).dequantize().numpy(), wanted)


def power_of_two(most: F32, to_even: bool) -> F32:
    """Two to the floor of the base-two logarithm, less two; 2^-127 is the smallest that a byte holds."""
    if most == 0:
        return F32(2.0**-127)
    fraction, exponent = math.frexp(float(most))
    return F32(2.0 ** max(-127, exponent - 1 - 2 + (to_even and fraction >= 0.875)))


@given(weight=matrices, to_even=st.booleans())
def test_mxfp4(weight: np.ndarray, to_even: bool) -> None:
    with np.errstate(all="ignore"):
        wanted = rounded(weight, (1, 32), FP4, lambda most: power_of_two(most, to_even))
    assert np.array_equal(mxfp4(torch.from_numpy(weight), to_even=to_even).dequantize().numpy(), wanted)


@given(weight=matrices)
def test_nvfp4(weight: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        whole = F32(1) / max(np.abs(weight).max(), np.finfo(F32).tiny) * F32(448 * 6)
        whole = whole if np.isfinite(whole) else F32(1)
        wanted = rounded(
            weight, (1, 16), FP4, lambda most: (nearest(whole * (most / F32(6)), E4M3) or F32(0.125)) / whole
        )
    assert np.array_equal(nvfp4(torch.from_numpy(weight)).dequantize().numpy(), wanted)


@given(weight=matrices, kind=st.sampled_from(["fp8", "fp8-runs", "mxfp4", "mxfp4-even", "nvfp4"]))
def test_inputs_are_rounded_token_by_token(weight: np.ndarray, kind: str) -> None:
    """As a weight of one row is; a token is rounded as if it were alone."""
    values = torch.from_numpy(weight)
    alone: dict[str, Any] = {
        "fp8": lambda row: fp8(row, (1, None)),
        "fp8-runs": lambda row: fp8(row, (1, 7)),
        "mxfp4": mxfp4,
        "mxfp4-even": partial(mxfp4, to_even=True),
        "nvfp4": nvfp4,
    }
    name, _, how = kind.partition("-")
    block = (7, 7) if how == "runs" else (None, None)
    found = rounded_tokens(values[None], name.upper(), block, to_even=how == "even")
    assert torch.equal(found[0], torch.cat([alone[kind](row[None]).dequantize() for row in values]))


def test_inputs_that_are_not_finite_stay_what_they_are() -> None:
    values = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0], [3.0, 4.0]])
    for kind in ("FP8", "MXFP4", "NVFP4"):
        found = rounded_tokens(values, kind, (1, None))
        assert found[0, 1].isnan() and found[1, 0] == torch.inf and found[2].isfinite().all()
        assert rounded_tokens(values[:0], kind, (1, None)).shape == (0, 2)


@pytest.mark.parametrize("kind", ["FP8", "MXFP4", "NVFP4"])
def test_inputs_are_rounded_where_they_are(kind: str) -> None:
    """Operations that mix the meta device and the processor fail, as those that mix a GPU and the processor do."""
    values = torch.empty(3, 5, 64, device="meta")
    found = rounded_tokens(values, kind, (1, None))
    assert found.device.type == "meta" and found.shape == values.shape


METHODS: dict[str, Layerwise] = {
    "fp8": Fp8(),
    "fp8-tensor": Fp8(granularity="tensor"),
    "fp8-block": Fp8(granularity="block", block_size=10),
    "mxfp4": Mxfp4(),
    "mxfp4-even": Mxfp4(scale="even"),
    "nvfp4": Nvfp4(),
    "fp8-inputs": Fp8(activations=True),
    "mxfp4-inputs": Mxfp4(scale="even", activations=True),
    "nvfp4-inputs": Nvfp4(activations=True),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_model_is_rounded_reported_and_kept(name: str, tiny_model: Callable[[str], Model], tmp_path: object) -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    targets = FF.select(model)
    before = {layer.path: layer.weight.clone() for layer in targets}
    method = METHODS[name]
    report = method.compress(model, targets)
    assert report.bits == (8 if name.startswith("fp8") else 4)
    for layer, told in zip(targets, report.layers, strict=True):
        found = quantized_weight(layer)
        assert found is not None and torch.equal(found.dequantize(), layer.weight)
        error = (layer.weight - before[layer.path]).norm() / before[layer.path].norm()
        assert 0 < error < (0.04 if name.startswith("fp8") else 0.2)
        assert told.overhead_bits > 0
    _write(tmp_path, model, report, method.modules, model.network.config, untied=False)  # type: ignore[arg-type]
    again = _restore(tmp_path, other, method.modules)  # type: ignore[arg-type]
    assert torch.equal(logits_of(model), logits_of(other))
    assert again.bits == report.bits
    for one, two in zip(targets, FF.select(other), strict=True):
        assert torch.equal(one.weight, two.weight)
        kept, first = quantized_weight(two), quantized_weight(one)
        assert kept is not None and first is not None and kept.coding == first.coding
    if not method.modules:
        targets[0].weight.mul_(2)
        assert quantized_weight(targets[0]) is None


@pytest.mark.parametrize("wrong", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_refused(wrong: float, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    targets = FF.select(model)
    targets[0].weight[0, 0] = wrong
    for method in METHODS.values():
        with pytest.raises(BadInput, match="not finite"):
            method.compress(model, targets)


def test_the_larger_scale_of_mxfp4_is_taken_where_the_largest_number_would_be_cut() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 0] = 7.5  # of 6 and 8, which are in reach of the scales 1 and 2
    assert float(mxfp4(weight).dequantize()[0, 0]) == 6
    assert float(mxfp4(weight, to_even=True).dequantize()[0, 0]) == 8


@pytest.mark.parametrize("name", ["fp8-inputs", "mxfp4-inputs", "nvfp4-inputs"])
def test_a_layer_multiplies_rounded_inputs_and_passes_gradients_on(
    name: str, tiny_model: Callable[[str], Model]
) -> None:
    model = tiny_model("gpt2")  # whose layers are transposed and have biases
    layer = FF.select(model)[0]
    bias = layer.bias
    METHODS[name].compress(model, FF.select(model))
    made: Any = layer.module
    inputs = torch.randn(2, 3, made.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rounded = rounded_tokens(inputs.detach(), made.kind, made.block, to_even=made.to_even)
    assert not torch.equal(rounded, inputs)
    outputs = made(inputs)
    assert torch.equal(outputs, torch.nn.functional.linear(rounded, layer.weight, bias))
    outputs.sum().backward()
    assert torch.allclose(inputs.grad, layer.weight.sum(0).expand_as(inputs))  # type: ignore[arg-type]
    assert made(inputs.bfloat16()).dtype == torch.bfloat16


def test_experts_round_their_inputs_too() -> None:
    model = Model(build_network("mixtral"), None, "mixtral")  # type: ignore[arg-type]
    plain = logits_of(model)
    experts = Target("experts", ["experts"])
    Fp8(activations=True).compress(model, experts.select(model))
    both = logits_of(model)
    weights = Model(build_network("mixtral"), None, "mixtral")  # type: ignore[arg-type]
    Fp8().compress(weights, experts.select(weights))
    for one, two in zip(experts.select(model), experts.select(weights), strict=True):
        assert torch.equal(one.weight, two.weight)
    assert 0 < (both - logits_of(weights)).norm() < 0.1 * plain.norm()
