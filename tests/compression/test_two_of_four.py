"""2:4 products are taken where they are right and faster; without a GPU the kernel is stood in for, not the choice."""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from knowledge_compression.compression.formats import int8_linear as quantized_linear
from knowledge_compression.compression.formats import two_of_four
from knowledge_compression.compression.formats.int8_linear import Int8Linear
from knowledge_compression.compression.formats.int8_products import integer_product
from knowledge_compression.compression.formats.two_of_four import (
    SparseProduct,
    can_skip_zeros,
    faster_product,
    is_two_of_four,
)

ON_GPU = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.backends.cusparselt.is_available()), reason="needs a GPU with cuSPARSELt"
)


def two_of_four_weight(outputs: int = 64, inputs: int = 96) -> Tensor:
    """float32 ``[outputs, inputs]`` with exactly two zeros in every four."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    groups = weight.unflatten(1, (-1, 4))
    return groups.scatter(2, groups.abs().argsort(2)[..., :2], 0.0).flatten(1)


class StandIn:
    """A sparse kernel as a GPU might have it, by the plain product; ``wrong`` by one, or refusing."""

    def __init__(self, wrong: int = 0, refuses: bool = False) -> None:
        self.wrong, self.refuses, self.calls = wrong, refuses, 0

    def __call__(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        if self.refuses:
            raise RuntimeError("CUDA error: architecture mismatch\nwith more lines")

        def product(rows: Tensor) -> Tensor:
            self.calls += 1
            return integer_product(rows, weight) + self.wrong

        return product


def times(monkeypatch: pytest.MonkeyPatch, sparse: float, dense: float) -> None:
    """Let the clock say so; dense and sparse are timed in turn, the sparse one first."""
    readings = iter([sparse, dense] * 100)
    monkeypatch.setattr(two_of_four, "timed", lambda _, work: (next(readings), work()))


def test_the_pattern_is_seen() -> None:
    weight = two_of_four_weight()
    assert is_two_of_four(weight)
    weight[3, 8:11] = 1.0
    assert not is_two_of_four(weight)
    assert not is_two_of_four(torch.zeros(4, 6))  # no whole groups


def test_a_cpu_has_no_units_for_it() -> None:
    layer = Int8Linear(two_of_four_weight(), None)
    assert is_two_of_four(layer.weight_int8) and not can_skip_zeros(layer.weight_int8)


def test_a_weight_that_was_taken_away_is_not_held() -> None:
    layer = Int8Linear(two_of_four_weight(), None)
    layer(torch.randn(80, 96))
    before = ref(layer.weight_int8)
    layer.weight_int8 = torch.ones_like(layer.weight_int8)
    assert before() is None


@pytest.mark.parametrize(
    ("kernel", "sparse", "taken"),
    [
        (StandIn(), 1.0, True),
        (StandIn(), 3.0, False),  # slower than the dense one's 2.0
        (StandIn(wrong=1), 1.0, False),
        (StandIn(refuses=True), 1.0, False),
    ],
)
def test_the_sparse_way_is_kept_where_it_is_right_and_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernel: StandIn, sparse: float, taken: bool
) -> None:
    monkeypatch.setattr(two_of_four, "SparseProduct", kernel)
    monkeypatch.setattr(quantized_linear, "can_skip_zeros", is_two_of_four)
    times(monkeypatch, sparse, 2.0)
    layer, states = Int8Linear(two_of_four_weight(), nn.Parameter(torch.randn(64))), torch.randn(80, 96)
    plain = Int8Linear(two_of_four_weight(), layer.bias)
    plain.multiply = lambda integers: integer_product(integers, plain.weight_int8)  # type: ignore[method-assign]
    for _ in range(2):
        assert torch.equal(layer(states), plain(states))
    before = kernel.calls
    assert torch.equal(layer(states), plain(states))
    assert (kernel.calls > before) == taken
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert bool([r for r in caplog.records if r.levelname == "WARNING"]) == (kernel.refuses or kernel.wrong > 0)


def test_small_products_decide_nothing_and_another_weight_is_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = StandIn()
    monkeypatch.setattr(two_of_four, "SparseProduct", kernel)
    monkeypatch.setattr(quantized_linear, "can_skip_zeros", is_two_of_four)
    times(monkeypatch, 1.0, 2.0)
    layer = Int8Linear(two_of_four_weight(), None)
    layer(torch.randn(5, 96))
    assert kernel.calls == 0
    layer(torch.randn(80, 96))
    assert kernel.calls > 0
    layer.weight_int8 = torch.ones_like(layer.weight_int8)  # not 2:4
    before, states = kernel.calls, torch.randint(-5, 5, (80, 96), dtype=torch.int8)
    assert torch.equal(layer.multiply(states), states.int().sum(1, keepdim=True).expand(-1, 64))
    assert kernel.calls == before


@ON_GPU
def test_the_kernel_gives_the_same_integers() -> None:
    weight = Int8Linear(two_of_four_weight(256, 512), None).weight_int8.cuda()
    assert can_skip_zeros(weight)
    for rows in (64, 71, 1024):
        states = torch.randint(-127, 128, (rows, 512), dtype=torch.int8, device="cuda")
        assert torch.equal(SparseProduct(weight)(states), integer_product(states, weight))
    found = faster_product(weight, states, lambda rows: integer_product(rows, weight))
    assert found is None or torch.equal(found(states), integer_product(states, weight))
