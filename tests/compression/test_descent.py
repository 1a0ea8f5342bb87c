"""Codes and scales improved in turn: against a slow float64 reference, and that nothing it does raises the error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowledge_compression.compression.methods.gptaq import Gptaq, PairedInputs
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.solve.descent import descended
from knowledge_compression.compression.solve.grid import QuantizedWeight
from knowledge_compression.compression.walk.blocks import LayerInputs

DAMPING = 0.01


def layer(seed: int, rows: int = 6, columns: int = 24, dead: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the second moments of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(80, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    if dead is not None:
        inputs[:, dead] = 0
    return torch.randn(rows, columns, generator=draw), inputs.T @ inputs / len(inputs)


def damped(hessian: torch.Tensor) -> torch.Tensor:
    diagonal = hessian.double().diagonal()
    return hessian.double() + DAMPING * diagonal[diagonal > 0].mean() * torch.eye(len(hessian))


def errors(weight: torch.Tensor, found: QuantizedWeight, hessian: torch.Tensor) -> torch.Tensor:
    """The damped output error of each row, float64."""
    apart = found.dequantize().double() - weight.double()
    return ((apart @ damped(hessian)) * apart).sum(1)


def one_round(weight: torch.Tensor, start: QuantizedWeight, hessian: torch.Tensor) -> torch.Tensor:
    """The definition, float64: scales by least squares on the inputs' square root, then one code after the other."""
    wanted, matrix, grid = weight.double(), damped(hessian), start.grid
    root = torch.linalg.cholesky(matrix)  # H = root rootᵀ, so the error is |rootᵀ e|²
    of = grid.group_of.long()
    levels = start.codes.double() - grid.zeros.double()[:, of]
    scales = grid.scales.double().clone()
    for row in range(len(wanted)):
        design = torch.stack([root.T @ (levels[row] * (of == group)) for group in range(scales.shape[1])], dim=1)
        scales[row] = torch.linalg.lstsq(design, root.T @ wanted[row]).solution
    scales = scales.half().double()
    for column in range(wanted.shape[1]):
        options = torch.arange(2**grid.bits) - grid.zeros.double()[:, of[column], None]
        tried = []
        for option in options.T:
            levels[:, column] = option
            apart = levels * scales[:, of] - wanted
            tried.append(((apart @ matrix) * apart).sum(1))
        levels[:, column] = options.gather(1, torch.stack(tried, dim=1).argmin(1, keepdim=True))[:, 0]
    return levels * scales[:, of]


@pytest.mark.parametrize("columns", [24, 80])  # 80: more than one block of columns
def test_one_round_is_the_definition(columns: int) -> None:
    weight, hessian = layer(1, columns=columns)
    start, *_ = Gptq(3, group_size=8).quantize(weight, hessian)
    found = descended(weight, start, hessian, damping=DAMPING, rounds=1)
    torch.testing.assert_close(found.dequantize().double(), one_round(weight, start, hessian), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.grid.scales.half().float(), found.grid.scales)
    assert torch.equal(found.grid.zeros, start.grid.zeros)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    method=st.builds(
        Gptq,
        bits=st.sampled_from([2, 3, 4]),
        group_size=st.sampled_from([None, 5, 8]),
        symmetric=st.booleans(),
        static_groups=st.booleans(),
    ),
    dead=st.sampled_from([None, 3]),
)
def test_no_round_raises_the_error_of_any_row(seed: int, method: Gptq, dead: int | None) -> None:
    weight, hessian = layer(seed, dead=dead)
    start, *_ = method.quantize(weight, hessian)
    before = errors(weight, start, hessian)
    for rounds in (1, 2, 4):
        after = errors(weight, descended(weight, start, hessian, damping=DAMPING, rounds=rounds), hessian)
        assert (after <= before * (1 + 1e-4) + 1e-9).all()
        before = after


def test_in_the_end_no_other_code_is_better() -> None:
    weight, hessian = layer(2)
    start, *_ = Gptq(3, group_size=8).quantize(weight, hessian)
    found = descended(weight, start, hessian, damping=DAMPING, rounds=100)
    least = errors(weight, found, hessian)
    assert least.sum() < 0.9 * errors(weight, start, hessian).sum()
    for column in range(weight.shape[1]):
        for step in (-1, 1):
            codes = found.codes.int()
            codes[:, column] = (codes[:, column] + step).clamp(0, 7)
            other = QuantizedWeight(codes.to(torch.uint8), found.grid)
            assert (errors(weight, other, hessian) >= least * (1 - 1e-5)).all()


def test_gptaq_is_refined_towards_its_own_target() -> None:
    draw = torch.Generator().manual_seed(3)
    there = torch.randn(200, 24, generator=draw) @ torch.randn(24, 24, generator=draw)
    here = there + 0.3 * torch.randn(200, 24, generator=draw) @ torch.randn(24, 24, generator=draw)
    weight = torch.randn(16, 24, generator=draw)
    statistics = PairedInputs(24, torch.device("cpu"))
    statistics.update(LayerInputs(here, dense=there))

    def missed(method: Gptq) -> float:
        rounded = method.solve(weight, statistics, [16]).quantized.dequantize()  # type: ignore[union-attr]
        return float((here.double() @ rounded.double().T - there.double() @ weight.double().T).square().sum())

    swept, refined = missed(Gptaq(3, alpha=1.0)), missed(Gptaq(3, alpha=1.0, refine=4))
    assert refined < 0.97 * swept
    assert missed(Gptq(3, refine=4)) > refined  # it would go back to the output on the inputs that it reads
