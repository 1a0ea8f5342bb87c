"""SparseGPT: against a slow float64 reference, exact in its counts, and through every architecture."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.layers import EVERYTHING, random_layer, relative_error, windows
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.compression.solve.grid import quantized_weight
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target

BLOCKS = Target("blocks", ["encoder_att", "decoder_self_att", "cross_att", "ff"])


def sparsegpt_reference(method: SparseGpt, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Float64, with the inverse of what is left taken anew at every column."""
    weight, n = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + method.damping * hessian.double().diagonal().mean() * torch.eye(n)
    unit = method.shape.of if method.shape else method.block_size
    scales = [1 / torch.linalg.inv(damped[i:, i:])[0, 0] for i in range(n)]
    grid = method.grid.fit(weight.float(), hessian.diagonal()) if method.grid else None
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for i in range(n):
        if i % unit == 0:
            part = slice(i, min(i + unit, n))
            scores = weight[:, part] ** 2 * torch.stack(scales[part])
            if method.shape:
                mask[:, part] = method.shape.removes(scores)
            else:
                count = round(method.sparsity * len(weight) * part.stop) - int(mask.sum())
                chosen = torch.zeros(scores.numel(), dtype=torch.bool)
                chosen[scores.flatten().argsort()[:count]] = True
                mask[:, part] = chosen.view_as(scores)
        new = weight[:, i].masked_fill(mask[:, i], 0)
        if grid:
            new = method.grid.round(new[:, None], grid[0].double(), grid[1].double())[:, 0]
        inverse = torch.linalg.inv(damped[i:, i:])
        error = (weight[:, i] - new) / inverse[0, 0]
        weight[:, i:] -= error[:, None] * inverse[0]
        weight[:, i] = new
    return weight


@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"block_size": 16},
        {"pattern": "2:4"},
        {"pattern": "4:8"},
        {"bits": 4},
        {"pattern": "2:4", "bits": 4},
        {"sparsity": 0.75, "damping": 0.1},
    ],
)
def test_sparsegpt_is_optimal_brain_surgery(settings_) -> None:
    method = SparseGpt(**({"sparsity": 0.5, "refit": 0} | settings_))
    weight, hessian = random_layer()
    pruned = method.prune(weight, hessian)
    expected = sparsegpt_reference(method, weight, hessian)
    same = (pruned.weight - expected).abs() < 1e-3 * weight.abs().max()
    assert same.all(dim=1).float().mean() > 0.8  # a tie that float32 sees otherwise moves the rest of its row
    assert relative_error(weight, pruned.weight, hessian) == pytest.approx(
        relative_error(weight, expected, hessian), rel=0.02
    )


@given(
    sparsity=st.floats(0, 0.99),
    rows=st.integers(1, 20),
    more=st.integers(1, 9),
    columns=st.integers(2, 50),
    block_size=st.integers(1, 64),
    seed=st.integers(0, 9),
)
@settings(max_examples=25)
def test_counts_are_exact_for_each_layer_of_a_stack(sparsity, rows, more, columns, block_size, seed) -> None:
    weight, hessian = random_layer(rows + more, columns, seed)
    pruned = SparseGpt(sparsity=sparsity, block_size=block_size).prune(weight, hessian, [rows, more])
    assert int(pruned.removed[:rows].sum()) == round(sparsity * rows * columns)
    assert int(pruned.removed[rows:].sum()) == round(sparsity * more * columns)
    assert not pruned.weight[pruned.removed].any()


@pytest.mark.parametrize(("pattern", "of", "keep"), [("2:4", 4, 2), ("4:8", 8, 4), ("1:4", 4, 1), ("3:4", 4, 3)])
@pytest.mark.parametrize("bits", [None, 4])
def test_patterns_are_exact(pattern: str, of: int, keep: int, bits: int | None) -> None:
    weight, hessian = random_layer()
    pruned = SparseGpt(sparsity=0.5, pattern=pattern, bits=bits).prune(weight, hessian)
    kept = (~pruned.removed).unflatten(1, (-1, of)).sum(-1)
    assert (kept == keep).all()
    assert not pruned.weight[pruned.removed].any()


def test_sparsegpt_errs_less_than_the_same_mask_without_making_up() -> None:
    weight, hessian = random_layer()
    pruned = SparseGpt(sparsity=0.5).prune(weight, hessian)
    masked = weight.masked_fill(pruned.removed, 0)
    assert relative_error(weight, pruned.weight, hessian) < 0.9 * relative_error(weight, masked, hessian)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_refitting_solves_the_least_squares_over_what_is_kept(pattern: str | None) -> None:
    weight, hessian = random_layer()
    pruned = SparseGpt(sparsity=0.5, pattern=pattern, refit=200, damping=0.1).prune(weight, hessian)
    damped = hessian.double() + 0.1 * hessian.diagonal().mean() * torch.eye(64)
    expected = torch.zeros(24, 64, dtype=torch.double)
    for row, (old, mask) in enumerate(zip(weight.double(), pruned.removed, strict=True)):
        left = ~mask
        expected[row, left] = torch.linalg.solve(damped[left][:, left], damped[left] @ old)
    torch.testing.assert_close(pruned.weight.double(), expected, rtol=1e-3, atol=1e-3)


def test_no_step_of_refitting_makes_it_worse_and_some_make_it_better() -> None:
    weight, hessian = random_layer()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64)
    swept, *fitted = (SparseGpt(sparsity=0.5, refit=steps).prune(weight, hessian) for steps in range(13))
    errors = [relative_error(weight, pruned.weight, damped) for pruned in (swept, *fitted)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]
    assert all(torch.equal(pruned.removed, swept.removed) for pruned in fitted)


def test_refitting_leaves_grids_and_rows_that_cannot_be_better_alone() -> None:
    weight, hessian = random_layer()
    assert torch.equal(*(SparseGpt(0.5, bits=4, refit=steps).prune(weight, hessian).weight for steps in (0, 12)))
    weight[3] = 0
    hessian[5] = hessian[:, 5] = 0
    for sparsity in (0.0, 0.5):
        pruned = SparseGpt(sparsity, refit=50).prune(weight, hessian)
        assert pruned.weight.isfinite().all()
        assert not pruned.weight[3].any()
        if sparsity == 0:
            assert torch.equal(pruned.weight, weight)


def test_a_hopeless_hessian_means_a_mask_alone() -> None:
    weight, hessian = random_layer()
    hessian = hessian - 1e9 * (1 - torch.eye(64))
    pruned = SparseGpt(sparsity=0.5).prune(weight, hessian)
    assert (pruned.damping, pruned.fallbacks) == (None, ["not_positive_definite"])
    assert torch.equal(pruned.weight, weight.masked_fill(pruned.removed, 0))
    assert int(pruned.removed.sum()) == weight.numel() // 2


@pytest.mark.parametrize("settings_", [{}, {"pattern": "2:4"}, {"bits": 4}, {"true_sequential": False}])
def test_sparsegpt_on_every_architecture(any_tiny_model: Model, settings_) -> None:
    targets = EVERYTHING.select(any_tiny_model)
    if "pattern" in settings_:  # the vocabulary's width is that of the hidden states, so the pattern fits it too
        targets = BLOCKS.select(any_tiny_model)
    report = SparseGpt(sparsity=0.5, **settings_).compress(any_tiny_model, targets, windows(8, 32))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    entries = {entry.path: entry for entry in report.layers}
    for layer in targets:
        entry = entries[layer.path]
        assert entry.removed == round(0.5 * layer.parameters)
        assert int((layer.weight == 0).sum()) >= entry.removed
        assert (quantized_weight(layer) is not None) == ("bits" in settings_)
    errors = [(layer.error_after, layer.error_before) for layer in report.layers]
    assert sum(after for after, _ in errors) < sum(before for _, before in errors)


def test_sparsegpt_is_deterministic(tiny_model) -> None:
    def weights():
        model = tiny_model("bart")
        SparseGpt(sparsity=0.5).compress(model, EVERYTHING.select(model), windows())
        return model.network.state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"pattern": "4:2"}, "pattern=4:2"),
        ({"pattern": "3:7"}, "3:7 does not"),
        ({"bits": 1}, "bits=1"),
        ({"damping": 0.0}, "damping"),
        ({"refit": -1}, "refit=-1"),
    ],
)
def test_bad_settings_are_refused(tiny_model, settings_, message) -> None:
    model = tiny_model("llama")
    with pytest.raises(BadInput, match=message):
        SparseGpt(**({"sparsity": 0.5} | settings_)).compress(model, EVERYTHING.select(model), windows())
