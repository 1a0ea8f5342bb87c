"""Float32 products by oneDNN are those of the layers, and stay where they belong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.networks import FAMILY, TINY
from helpers.questions import CONTINUING, assert_equals_plain, random_questions
from knowledge_compression.evaluation.scoring import Blank, Scorer, products
from knowledge_compression.evaluation.scoring.products import linears_for_onednn, multiplied_by_onednn, onednn_linear
from knowledge_compression.models import Model
from knowledge_compression.models.device import Device
from knowledge_compression.models.families import ENCODER

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="PyTorch has no oneDNN here",
)


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """As on a processor on which oneDNN is faster, tiny layers with the others; the weights that it multiplied."""
    multiplied = []

    def product(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        multiplied.append(weight.shape)
        return onednn_linear(states, weight, bias)

    monkeypatch.setitem(Device.known, CPU, Device(CPU, onednn_products=True))
    monkeypatch.setattr(products, "_NARROWEST", 1)
    monkeypatch.setattr(products, "onednn_linear", product)
    return multiplied


@given(
    rows=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    bias=st.booleans(),
)
@settings(max_examples=40)
def test_the_product_is_that_of_the_layer(rows: list[int], sizes: tuple[int, int], bias: bool) -> None:
    linear = nn.Linear(*sizes, bias=bias)
    states = torch.randn(*rows, sizes[0])
    with torch.inference_mode():
        expected = linear(states)
        with multiplied_by_onednn([linear]):
            found = linear(states)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", CONTINUING)
def test_continuations_equal_plain(
    tiny_model: Callable[[str], Model], by_onednn: list[torch.Size], architecture: str
) -> None:
    model = tiny_model(architecture)
    assert_equals_plain(model, random_questions(21))
    assert set(by_onednn) == {linear.weight.shape for linear in linears_for_onednn(model.network)} != set()
    assert not any("forward" in vars(module) for module in model.network.modules())


@pytest.mark.parametrize("architecture", [name for name in TINY if FAMILY[name] == ENCODER])
def test_blanks_equal_those_without(
    tiny_model: Callable[[str], Model], by_onednn: list[torch.Size], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    model = tiny_model(architecture)
    blanks = [Blank([2, *range(7, 7 + n), 4, 3], n + 1) for n in range(1, 12)]

    def scored() -> torch.Tensor:
        parts = list(Scorer(model).distributions(blanks))
        order = torch.tensor([i for indices, _ in parts for i in indices])
        return torch.cat([rows for _, rows in parts])[order.argsort()]

    found = scored()
    assert by_onednn
    by_onednn.clear()
    monkeypatch.setitem(Device.known, CPU, Device(CPU, onednn_products=False))
    torch.testing.assert_close(found, scored(), rtol=1e-4, atol=1e-5)
    assert not by_onednn


def test_layers_that_are_not_plain_float32_linears_are_left_alone(by_onednn: list[torch.Size]) -> None:
    hooked = nn.Linear(4, 4)
    hooked.forward = lambda states: states  # type: ignore[method-assign]  # as accelerate does
    strided = nn.Linear(4, 4)
    strided.weight = nn.Parameter(torch.randn(4, 4).T)
    network = nn.ModuleList(
        [nn.Linear(4, 4).bfloat16(), hooked, strided, nn.Linear(4, 4, device="meta"), nn.Bilinear(4, 4, 4)]
    )
    assert linears_for_onednn(network) == []


def test_what_fails_leaves_the_layers_as_they_were() -> None:
    linear = nn.Linear(4, 4)
    with pytest.raises(RuntimeError), multiplied_by_onednn([linear]):
        linear(torch.randn(2, 3))
    assert "forward" not in vars(linear)


def test_autocast_keeps_its_own_products() -> None:
    linear = nn.Linear(4, 4)
    with torch.inference_mode(), multiplied_by_onednn([linear]), torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(2, 4)).dtype == torch.bfloat16
