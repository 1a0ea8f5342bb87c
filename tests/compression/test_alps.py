"""ALPS: against a slow float64 reference, exact in its counts, and nearer than a single sweep."""

from __future__ import annotations

import pytest
import torch

from helpers.layers import EVERYTHING, random_layer, relative_error, windows
from knowledge_compression.compression.methods.alps import Alps
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.errors import BadInput


def reference(method: Alps, weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Algorithm 1 with the published schedule, float64: a system is solved anew in each iteration, and the kept
    weights of each row are solved for directly. Also how strongly the copies were drawn together at the end.
    """
    weight, hessian = weight.double(), hessian.double()
    hessian = hessian + method.damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    norms = hessian.diagonal().sqrt()
    scaled, start = hessian / torch.outer(norms, norms), weight * norms

    def projected(values: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(values)
        if method.shape:
            groups, width = (
                [(i, j) for i in range(len(values)) for j in range(0, values.shape[1], method.shape.of)],
                method.shape.of,
            )
            for i, j in groups:
                best = sorted(range(j, j + width), key=lambda c: -abs(float(values[i, c])))[: method.shape.keep]
                result[i, best] = values[i, best]
            return result
        keep = values.numel() - round(method.sparsity * values.numel())
        for at in sorted(range(values.numel()), key=lambda k: -abs(float(values.flatten()[k])))[:keep]:
            result.view(-1)[at] = values.flatten()[at]
        return result

    rho, dense, sparse, dual, moving = 0.1, start, projected(start), torch.zeros_like(start), False
    first, old = sparse, sparse != 0
    kept = int(old.sum())
    for step in range(1, method.iterations + 1):
        wanted = start @ scaled - dual + rho * sparse
        dense = torch.linalg.solve(scaled + rho * torch.eye(len(scaled)), wanted.T).T
        sparse = projected(dense + dual / rho)
        dual = dual + rho * (dense - sparse)
        if step % 3 == 0:
            changed = int(((sparse != 0) != old).sum())
            old = sparse != 0
            if changed > 0.005 * kept:
                moving, rho = True, rho * (1.3 if changed > 0.1 * kept else 1.2)
            elif changed and moving:
                rho *= 1.1
            elif moving:
                break
            else:
                rho /= 5
                if changed:
                    sparse, dual = first, torch.zeros_like(start)
            if step > 30 and changed < 0.0003 * kept:
                break
    mask, result = projected(dense) != 0, torch.zeros_like(weight)
    for i, row in enumerate(mask):
        there = row.nonzero()[:, 0]
        result[i, there] = torch.linalg.solve(hessian[there][:, there], hessian[there] @ weight[i])
    return result, rho


@pytest.mark.parametrize("settings_", [{}, {"sparsity": 0.7, "damping": 0.1}, {"pattern": "2:4"}])
def test_it_is_the_definition(settings_) -> None:
    weight, hessian = random_layer(rows=12, columns=32)
    method = Alps(**({"sparsity": 0.5} | settings_))
    solved = method.prune(weight, hessian)
    wanted, rho = reference(method, weight, hessian)
    assert rho > 0.1  # it went on until the mask had settled
    assert ((wanted == 0) == solved.removed).double().mean() > 0.99  # a tie in float32 may fall to either side
    found, best = (relative_error(weight, one, hessian) for one in (solved.weight, wanted))
    assert found == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize("settings_", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"sparsity": 0.0, "pattern": "2:4"}])
def test_it_comes_nearer_than_a_single_sweep(settings_) -> None:
    for seed in range(3):
        weight, hessian = random_layer(rows=48, columns=64, seed=seed)
        found, swept = (method(**settings_).prune(weight, hessian).weight for method in (Alps, SparseGpt))
        assert relative_error(weight, found, hessian) < 0.95 * relative_error(weight, swept, hessian)


def test_each_layer_loses_exactly_its_share() -> None:
    weight, hessian = random_layer(rows=24, columns=64)
    removed = Alps(0.37).prune(weight, hessian, [16, 8]).removed
    assert [int(part.sum()) for part in removed.split([16, 8])] == [round(0.37 * 16 * 64), round(0.37 * 8 * 64)]
    assert (Alps(0.0, pattern="1:4").prune(weight, hessian).removed.unflatten(1, (-1, 4)).sum(-1) == 3).all()


def test_dead_inputs_and_a_layer_without_text() -> None:
    weight, hessian = random_layer(rows=8, columns=16)
    hessian[3], hessian[:, 3] = 0, 0
    assert Alps(0.5).prune(weight, hessian).fallbacks == ["dead_input"]
    nothing = Alps(0.5).prune(weight, torch.zeros_like(hessian))
    assert int(nothing.removed.sum()) == 64 and nothing.weight.isfinite().all()


@pytest.mark.parametrize("architecture", ["llama", "t5", "mixtral"])
def test_networks_are_pruned(tiny_model, architecture: str) -> None:
    model = tiny_model(architecture)
    targets = EVERYTHING.select(model)
    report = Alps(0.5, iterations=60).compress(model, targets, windows())
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    for layer, said in zip(targets, report.layers, strict=True):
        assert int((layer.weight == 0).sum()) >= said.removed == round(0.5 * layer.parameters)


def test_bad_settings_are_one_line() -> None:
    with pytest.raises(BadInput, match=r"sparsity=1\.2 is not a share"):
        Alps(1.2)
    with pytest.raises(BadInput, match="pattern=2-4 is not of the form"):
        Alps(0.5, pattern="2-4")
