"""AutoRound: one step against a slow float64 reference, and blocks that come closer to the uncompressed ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.layers import ALL, EVERYTHING, random_layer, windows
from helpers.networks import MIXTURES, TINY
from helpers.places import EXHAUSTIVE
from knowledge_compression.compression.methods.autoround import AutoRound, _first
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.solve.grid import Grid, plainly_rounded, quantized_weight
from knowledge_compression.compression.solve.tuned import REACH, TunedRounding
from knowledge_compression.compression.walk.tuning import Call
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model

TUNED = {"group_size": 8, "forward_dtype": "float32", "steps": 40, "batch": 48, "rate": 0.002, "scale_rate": 0.002}
BRIEFLY = TUNED | {"steps": 10}  # where it only matters that something is tuned, not by how much
# Each family, transposed weights, one block used many times, windows that alternate, a decoder behind an encoder.
ARCHITECTURES = sorted(TINY) if EXHAUSTIVE else ["albert", "bert", "gemma3_text", "gpt2", "llama", "t5"]
# Banks as they are published: plain, and transposed with biases; and with an expert that all tokens share.
BANKS = list(MIXTURES) if EXHAUSTIVE else ["mixtral", "gpt_oss", "llama4_text"]


@pytest.mark.parametrize("symmetric", [False, True])
def test_steps_are_those_of_the_equations(symmetric: bool) -> None:
    """Codes and scales after five steps, entry by entry in float64, with gradients of a fixed quadratic loss."""
    weight, hessian = random_layer(rows=6, columns=32)
    grid = Grid(3, 8, symmetric=symmetric)
    start = plainly_rounded(weight, grid)
    found = TunedRounding(start, weight)
    scales, zeros = start.grid.scales.double(), start.grid.zeros.double()
    codes = start.codes.double()
    place = [[0.0] * 32 for _ in range(6)]
    first = [[0.0] * 32 for _ in range(6)]
    factor = [[1.0] * 4 for _ in range(6)]
    for i in range(6):
        for j in range(32):
            wanted = float(weight[i, j]) / float(scales[i, j // 8]) + float(zeros[i, j // 8])
            first[i][j] = place[i][j] = min(max(wanted, float(codes[i, j]) - 0.49), float(codes[i, j]) + 0.49)

    def level(i: int, j: int) -> float:
        return min(max(round(place[i][j]), 0), 7) - float(zeros[i, j // 8])

    def read() -> torch.Tensor:
        def scale(i: int, g: int) -> float:
            return float(torch.tensor(float(scales[i, g]) * factor[i][g]).half())

        return torch.tensor([[level(i, j) * scale(i, j // 8) for j in range(32)] for i in range(6)]).double()

    for rate in (0.1, 0.08, 0.06, 0.04, 0.02):
        now = read()
        torch.testing.assert_close(found.weight().double(), now, rtol=1e-5, atol=1e-6)
        gradient = 2 * (now - weight.double()) @ hessian.double()
        found.follow(gradient.float(), rate, rate / 10)
        for i in range(6):
            for g in range(4):
                total = sum(float(gradient[i, j]) * level(i, j) for j in range(8 * g, 8 * g + 8))
                factor[i][g] -= rate / 10 * ((total > 0) - (total < 0))
            for j in range(32):
                moved = place[i][j] - rate * float(gradient[i, j].sign())
                place[i][j] = min(max(moved, first[i][j] - REACH), first[i][j] + REACH)
    quantized = found.quantized()
    torch.testing.assert_close(quantized.dequantize().double(), read(), rtol=1e-5, atol=1e-6)
    assert torch.equal(quantized.dequantize(), found.weight())
    assert not torch.equal(quantized.codes, start.codes)


@pytest.mark.parametrize("columns", [32, 28])
def test_groups_may_be_of_any_columns(columns: int) -> None:
    """Equal groups in the order of the columns are added up in another way than scattered and unequal ones."""
    weight, hessian = random_layer(rows=6, columns=columns)
    start = plainly_rounded(weight, Grid(3, 8))
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    grid = replace(start.grid, group_of=start.grid.group_of[order])
    found = TunedRounding(start, weight)
    scattered = TunedRounding(replace(start, codes=start.codes[:, order], grid=grid), weight[:, order])
    for rate in (0.1, 0.05):
        gradient = (found.weight() - weight) @ hessian
        scattered.follow(gradient[:, order], rate, rate / 10)
        found.follow(gradient, rate, rate / 10)
        torch.testing.assert_close(scattered.weight(), found.weight()[:, order], rtol=1e-6, atol=0)
    assert torch.equal(scattered.quantized().codes, found.quantized().codes[:, order])


def block_errors(model: Model, method: AutoRound, caplog) -> list[tuple[float, float]]:
    with caplog.at_level("INFO"):
        method.compress(model, ALL.select(model), windows(16))
    said = [record.args for record in caplog.records if "tuned" in record.msg]
    return [(before, after) for _, before, after in said]


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(n, marks=() if n in ("bert", "t5", "llama", "gpt2") else pytest.mark.slow) for n in ARCHITECTURES],
)
def test_every_block_comes_closer_to_the_uncompressed_one(tiny_model, architecture: str, caplog) -> None:
    model = tiny_model(architecture)
    errors = block_errors(model, AutoRound(3, **TUNED), caplog)
    blocks = model.architecture.block_paths(model.network)
    assert len(errors) == len(blocks)
    for before, after in errors:
        assert after < before, errors
    assert sum(after for _, after in errors) < 0.97 * sum(before for before, _ in errors)


@pytest.mark.parametrize(
    "architecture", [pytest.param(n, marks=() if n == "mixtral" else pytest.mark.slow) for n in BANKS]
)
def test_experts_are_tuned_too(tiny_model, architecture: str) -> None:
    def codes(method) -> dict[str, torch.Tensor]:
        model = tiny_model(architecture)
        targets = EVERYTHING.select(model)
        method.compress(model, targets, windows(16))
        return {
            layer.path: quantized_weight(layer).codes for layer in targets if layer.expert or ".experts." in layer.path
        }

    start, tuned = codes(AutoRound(3, **(TUNED | {"steps": 0}))), codes(AutoRound(3, **TUNED))
    changed = [path for path in start if not torch.equal(start[path], tuned[path])]
    assert len(changed) > len(start) / 2


def test_without_steps_it_is_gptq(tiny_model) -> None:
    weights = []
    for method in (
        AutoRound(3, **(TUNED | {"steps": 0})),
        Gptq(3, group_size=8, forward_dtype="float32", true_sequential=False, refine=3, damping=0.03),
    ):
        model = tiny_model("llama")
        method.compress(model, ALL.select(model), windows(16))
        weights.append([layer.weight.clone() for layer in ALL.select(model)])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_seed_decides(tiny_model) -> None:
    def weights(seed: int) -> torch.Tensor:
        model = tiny_model("llama")
        AutoRound(3, seed=seed, **BRIEFLY).compress(model, ALL.select(model), windows(16))
        return torch.cat([layer.weight.flatten() for layer in ALL.select(model)])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_no_parameter_is_left_asking_for_gradients_and_codes_are_kept(tiny_model) -> None:
    model = tiny_model("llama")
    before = [parameter.requires_grad for parameter in model.network.parameters()]
    AutoRound(3, **BRIEFLY).compress(model, ALL.select(model), windows(16))
    assert [parameter.requires_grad for parameter in model.network.parameters()] == before
    assert all(parameter.grad is None for parameter in model.network.parameters())
    for layer in ALL.select(model):
        assert torch.equal(quantized_weight(layer).dequantize(), layer.weight)


def test_the_report_is_of_the_tuned_weights(tiny_model) -> None:
    """The relative output error of the first layer, whose inputs no compression changes, from its own weights."""
    model, dense = tiny_model("llama"), tiny_model("llama")
    report = AutoRound(3, **TUNED).compress(model, ALL.select(model), windows(16)).layers[0]
    path, seen = "model.layers.0.self_attn.q_proj", []
    hook = dense.network.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for window in windows(16):
        dense.network(input_ids=window[None])
    hook.remove()
    inputs = torch.cat(seen).double()
    was, now = (one.network.get_submodule(path).weight.detach().double() for one in (dense, model))
    assert report.path == path
    wanted = float((inputs @ (now - was).T).square().sum() / (inputs @ was.T).square().sum())
    assert report.error_after == pytest.approx(wanted, rel=1e-3)


def test_a_block_that_would_become_worse_keeps_its_start(tiny_model, monkeypatch) -> None:
    wild = TUNED | {"steps": 1, "rate": 1.0, "scale_rate": 1.0}
    monkeypatch.setattr("knowledge_compression.compression.methods.autoround._SHARES", (1,))
    results = []
    for settings in (wild, TUNED | {"steps": 0}):
        model = tiny_model("llama")
        AutoRound(3, **settings).compress(model, ALL.select(model), windows(16))
        results.append(torch.cat([layer.weight.flatten() for layer in ALL.select(model)]))
    assert torch.equal(*results)


def test_a_part_of_a_long_text_tells_whether_the_error_falls() -> None:
    calls = [Call(lambda: torch.zeros(2, 5, 3), torch.zeros(2, 5, 3)) for _ in range(4)]
    assert [len(_first(calls, tokens)) for tokens in (5, 10, 25, 100)] == [1, 1, 3, 4]


def test_linear_by_linear_is_refused() -> None:
    with pytest.raises(BadInput, match=r"tunes whole blocks; leave compression\.true_sequential=false"):
        AutoRound(true_sequential=True)
