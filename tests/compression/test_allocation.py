"""Budgets: met to the bit, spread by plain references of the published rules, resumed, and refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from helpers.experiments import made
from helpers.networks import VOCABULARY, logits_of
from knowledge_compression.compression.allocation import sensitivity
from knowledge_compression.compression.allocation.allocated import Allocated
from knowledge_compression.compression.allocation.kl import Kl, Noise
from knowledge_compression.compression.allocation.owl import Owl
from knowledge_compression.compression.allocation.sensitivity import Sensitivity
from knowledge_compression.compression.allocation.uniform import Uniform
from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.compression.methods.awq import Awq
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.hqq import Hqq
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.nf4 import Nf4
from knowledge_compression.compression.methods.pipeline import Pipeline
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.compression.methods.wanda import Wanda
from knowledge_compression.compression.solve.knapsack import least_harm
from knowledge_compression.compression.walk.passes import read_text
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target
from knowledge_compression.models.loading import LocalModel

ALL = Target("all", ["encoder_att", "decoder_self_att", "cross_att", "ff", "experts"])
TEXT = torch.randint(7, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "allocations"


def done(method: Any, allocation: Any, model: Model) -> CompressionReport:
    return Allocated(method, allocation).compress(model, ALL.select(model), TEXT)


layers = st.lists(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 40)), min_size=1, max_size=4), min_size=1, max_size=4
)


@settings(max_examples=60)
@given(layers, st.integers(0, 150))
def test_no_other_choices_within_the_budget_do_less_harm(choices: Any, budget: int) -> None:
    harms = [[float(harm) for harm, _ in of_layer] for of_layer in choices]
    costs = [[cost for _, cost in of_layer] for of_layer in choices]
    every = [
        sum(harms[i][c] for i, c in enumerate(combination))
        for combination in product(*(range(len(of_layer)) for of_layer in choices))
        if sum(costs[i][c] for i, c in enumerate(combination)) <= budget
    ]
    found = least_harm(harms, costs, budget)
    assert (found is None) == (not every)
    if found is not None:
        assert sum(costs[i][c] for i, c in enumerate(found)) <= budget
        assert sum(harms[i][c] for i, c in enumerate(found)) == min(every)


def test_a_budget_too_fine_for_its_steps_is_still_kept() -> None:
    draw = torch.Generator().manual_seed(0)
    costs = [sorted(torch.randint(1, 10**9, (3,), generator=draw).tolist()) for _ in range(40)]
    harms = [[3.0, 2.0, 1.0]] * 40
    budget = sum(middle for _, middle, _ in costs)
    chosen = least_harm(harms, costs, budget)
    spent = sum(of_layer[choice] for of_layer, choice in zip(costs, chosen, strict=True))
    left = budget - spent
    assert left >= 0
    steps = [
        of_layer[choice + 1] - of_layer[choice] for of_layer, choice in zip(costs, chosen, strict=True) if choice < 2
    ]
    assert min(steps) > left  # nothing more could be bought


@pytest.mark.parametrize(
    "method", [Rtn(bits=3), Gptq(bits=3, group_size=8), Awq(bits=3, group_size=8), Hqq(bits=3, group_size=8)]
)
def test_what_is_foreseen_is_what_is_stored(method: Any, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    targets = ALL.select(model)
    foreseen = [method.stored_bits(layer) for layer in targets]
    report = method.compress(model, targets, TEXT)
    assert foreseen == [layer.stored_bits for layer in report.layers]


@pytest.mark.parametrize(
    "method", [Gptq(bits=3, group_size=8), Rtn(bits=3), SparseGpt(sparsity=0.5), Magnitude(sparsity=0.5, scope="layer")]
)
def test_with_nothing_to_choose_it_is_the_method_itself(method: Any, tiny_model: Callable[[str], Model]) -> None:
    plain, uniform = tiny_model("llama"), tiny_model("llama")
    method.compress(plain, ALL.select(plain), TEXT)
    report = done(method, Uniform(), uniform)
    assert torch.equal(logits_of(plain), logits_of(uniform)) and report.allocation["gap"] == 0
    if not isinstance(method, Rtn | Gptq):  # no block differs from another by a span of nothing
        even = tiny_model("llama")
        done(method, Owl(spread=0.0), even)
        assert torch.equal(logits_of(plain), logits_of(even))


@pytest.mark.parametrize("allocation", [Owl, Sensitivity, Kl])
@pytest.mark.parametrize("method", [Magnitude(sparsity=0.1), SparseGpt(sparsity=0.1)])
def test_a_budget_of_weights_is_met_to_the_weight(
    method: Any, allocation: Any, tiny_model: Callable[[str], Model]
) -> None:
    for asked in (0.37, 0.6):
        model = tiny_model("llama")
        report = done(method, allocation(sparsity=asked), model)
        weights = sum(layer.parameters for layer in report.layers)
        assert report.removed == round(asked * weights)
        assert len({round(layer.sparsity, 3) for layer in report.layers}) > 1
        assert report.allocation["values"].keys() == {layer.path for layer in report.layers}


@pytest.mark.parametrize("allocation", [Owl, Sensitivity, Kl])
def test_a_budget_of_bits_is_kept_and_the_gap_told(allocation: Any, tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    report = done(Gptq(group_size=8), allocation(bits=6.25), model)
    spent = sum(layer.stored_bits for layer in report.layers)
    weights = sum(layer.parameters for layer in report.layers)
    told = report.allocation
    assert spent <= 6.25 * weights and told["reached"] == spent / weights
    assert told["gap"] == pytest.approx(6.25 - spent / weights)
    smallest = min(layer.parameters for layer in report.layers)
    assert told["gap"] * weights <= 5.7 * smallest  # the widest step that the smallest layer can take
    assert {layer.bits for layer in report.layers} == set(told["values"].values()) and len(
        set(told["values"].values())
    ) > 1
    assert CompressionReport.from_json(json.loads(json.dumps(report.to_json()))).allocation == told


def test_the_choice_is_that_of_least_measured_error(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    target = Target("att", ["decoder_self_att"], blocks=[0])
    report = Allocated(Rtn(), Sensitivity(bits=6.0)).compress(model, target.select(model), TEXT)
    told = report.allocation
    errors = {path: {float(k): v for k, v in of.items()} for path, of in told["measured"]["errors"].items()}
    fresh = target.select(tiny_model("llama"))
    costs = {(x.path, b): Rtn(bits=b).stored_bits(x) for x in fresh for b in (2, 3, 4, 8)}
    budget = int(6.0 * sum(layer.parameters for layer in fresh))
    best = min(
        sum(errors[path][b] for path, b in zip(errors, combination, strict=True))
        for combination in product((2, 3, 4, 8), repeat=len(errors))
        if sum(costs[path, b] for path, b in zip(errors, combination, strict=True)) <= budget
    )
    assert sum(errors[path][value] for path, value in told["values"].items()) == pytest.approx(best)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_the_choice_is_that_of_least_foretold_divergence(family: str, tiny_model: Callable[[str], Model]) -> None:
    def loud() -> Model:  # as random networks are made, a layer hardly moves their answers
        made = tiny_model(family)
        for layer in ALL.select(made):
            layer.weight.mul_(10)
        return made

    model = loud()
    target = Target("att", ["encoder_att" if family == "bert" else "decoder_self_att"], blocks=[0])
    allocation = Kl(bits=6.0, noise=0.05, windows=2)
    before = logits_of(model)
    told = Allocated(Rtn(), allocation).compress(model, target.select(model), TEXT).allocation
    errors, factors = told["measured"]["errors"], told["measured"]["nats_by_error"]
    fresh = loud()
    layers = target.select(fresh)
    dense = read_text(fresh, TEXT[:2]).detach().flatten(0, 1).double().softmax(-1).numpy()
    for layer in layers:
        seen: list[torch.Tensor] = []
        hook = layer.module.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0].detach().flatten(0, 1).double())
        )
        with torch.no_grad():
            read_text(fresh, TEXT)
            hook.remove()
            weight = layer.weight.clone()
            Noise(0.05).shrink(layer)
            added = layer.weight - weight
            noisy = read_text(fresh, TEXT[:2]).flatten(0, 1).double().softmax(-1).numpy()
            layer.weight.copy_(weight)
        assert float(added.square().mean() / weight.square().mean()) == pytest.approx(0.05**2, rel=0.3)
        error = float((seen[0] @ added.double().T).square().sum() / (seen[0] @ weight.double().T).square().sum())
        assert factors[layer.path] == pytest.approx(entropy(dense, noisy, axis=-1).mean() / error, rel=0.02)
    costs = {(x.path, b): Rtn(bits=b).stored_bits(x) for x in layers for b in (2, 3, 4, 8)}
    affordable = [
        dict(zip(errors, combination, strict=True))
        for combination in product((2, 3, 4, 8), repeat=len(errors))
        if sum(costs[path, bits] for path, bits in zip(errors, combination, strict=True))
        <= 6.0 * sum(layer.parameters for layer in layers)
    ]
    harms = [sum(factors[path] * errors[path][f"{bits}"] for path, bits in one.items()) for one in affordable]
    chosen = {path: int(bits) for path, bits in told["values"].items()}
    assert harms[affordable.index(chosen)] == pytest.approx(min(harms))
    assert told["tokens"] == TEXT.numel() + (1 + len(layers)) * TEXT[:2].numel()
    assert torch.equal(before, logits_of(fresh)) and not torch.equal(before, logits_of(model))


def test_measured_errors_are_those_of_the_layers_outputs(tiny_model: Callable[[str], Model]) -> None:
    model, seen = tiny_model("llama"), []
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    path = "model.layers.1.mlp.down_proj"
    layer = model.network.get_submodule(path)
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, 1).double()))
    with torch.no_grad():
        model.network(input_ids=TEXT)
    inputs, weight = torch.cat(seen), layer.weight.detach().double()
    at = {"3": Rtn(bits=3)}
    errors = sensitivity.measured_errors(at, model, ALL.select(model), TEXT)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.network.state_dict().items())
    rounded = tiny_model("llama")
    Rtn(bits=3).compress(rounded, ALL.select(rounded))
    new = rounded.network.get_submodule(path).weight.detach().double()
    expected = float(((inputs @ (weight - new).T) ** 2).sum() / ((inputs @ weight.T) ** 2).sum())
    assert errors[path]["3"] == pytest.approx(expected, rel=1e-4)


def test_owl_by_hand(tiny_model: Callable[[str], Model]) -> None:
    model, inputs = tiny_model("llama"), {}
    targets = ALL.select(model)
    for layer in targets:
        layer.module.register_forward_pre_hook(
            lambda _, given, path=layer.path: inputs.__setitem__(path, given[0].detach().flatten(0, 1).double())
        )
    with torch.no_grad():
        model.network(input_ids=TEXT)
    outliers, sizes = [0.0, 0.0], [0, 0]
    for layer in targets:
        scores = layer.weight.double().abs() * inputs[layer.path].square().mean(0).sqrt()
        outliers[layer.block] += float((scores > 2.0 * scores.mean()).sum())
        sizes[layer.block] += layer.parameters
    shares = [count / size for count, size in zip(outliers, sizes, strict=True)]
    report = done(Magnitude(sparsity=0.0), Owl(outlier=2.0, spread=0.1, sparsity=0.5), tiny_model("llama"))
    measured = report.allocation["measured"]["outliers"]
    assert {round(share, 6) for share in measured.values()} == {round(share, 6) for share in shares}
    rich = shares.index(max(shares))  # two blocks of one size: half the span on each side
    for layer in report.layers:
        block = int(layer.path.split(".")[2])
        assert layer.sparsity == pytest.approx(0.4 if block == rich else 0.6, abs=0.01)


def test_an_interrupted_search_goes_on_where_it_was(
    tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    whole = done(Gptq(group_size=8), Sensitivity(bits=6.0), tiny_model("llama")).allocation
    (file,) = cache.glob("*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 14
    file.write_text("".join(lines[:9]) + lines[9][:20])  # killed while it wrote the tenth
    measured: list[str] = []
    add = sensitivity.Kept.add
    monkeypatch.setattr(
        sensitivity.Kept, "add", lambda self, path, errors: (measured.append(path), add(self, path, errors))[1]
    )
    again = done(Gptq(group_size=8), Sensitivity(bits=6.0), tiny_model("llama")).allocation
    assert len(measured) == 5 and again["values"] == whole["values"]
    assert again["measured"] == whole["measured"] and file.read_text() == "".join(lines)


def test_runs_that_measure_the_same_at_once_keep_what_each_finds(tiny_model: Callable[[str], Model]) -> None:
    """As the runs of a sweep over budgets do, whose layers are measured at the same values."""
    model = tiny_model("llama")
    runs = [sensitivity.Kept.of(["same"], model, None) for _ in range(4)]

    def measure(number: int) -> None:
        for layer in range(25):
            runs[number].add(f"{number}.{layer}", {"4": float(layer)})

    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(measure, range(len(runs))))  # raises what a run meets
    wanted = {f"{number}.{layer}": {"4": float(layer)} for number in range(len(runs)) for layer in range(25)}
    assert sensitivity.Kept.of(["same"], model, None).found == wanted


def test_an_interrupted_search_by_divergence_goes_on_too(
    tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    whole = done(Rtn(), Kl(bits=6.0), tiny_model("llama")).allocation
    files = list(cache.glob("*.jsonl"))
    assert len(files) == 2
    for file in files:
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:9]))
    noised: list[str] = []
    shrink = Noise.shrink
    monkeypatch.setattr(Noise, "shrink", lambda self, layer: (noised.append(layer.path), shrink(self, layer))[1])
    again = done(Rtn(), Kl(bits=6.0), tiny_model("llama")).allocation
    assert {key: again[key] for key in ("values", "measured")} == {key: whole[key] for key in ("values", "measured")}
    assert sorted(noised) == sorted(list(whole["values"])[9:] * 2)  # once for the error, once for the divergence


@pytest.mark.parametrize(
    ("method", "allocation", "said"),
    [
        (Gptq(group_size=8), {"bits": 1.5}, "cannot be met: .* takes at least [0-9.]+ bits"),
        (Nf4(), {"bits": 3.0}, "has no such setting"),
        (Gptq(), {"sparsity": 0.5}, "has no such setting"),
        (Wanda(sparsity=0.5), {"bits": 3.0}, "has no such setting"),
        (Wanda(sparsity=0.5, pattern="2:4"), {}, "pattern already sets"),
        (Pipeline([Wanda(sparsity=0.5)]), {}, "a single method"),
        (Gptq(), {"bits": 3.0, "sparsity": 0.5}, "two budgets"),
    ],
)
def test_budgets_that_cannot_be_met_are_one_line(
    method: Any, allocation: dict[str, float], said: str, tiny_model: Callable[[str], Model]
) -> None:
    model = tiny_model("llama")
    before = logits_of(model)
    for kind in (Uniform, Owl, Sensitivity, Kl):
        with pytest.raises(BadInput, match=said):
            done(method, kind(**allocation), model)
    assert torch.equal(before, logits_of(model))


def test_a_budget_that_cannot_be_met_is_told_before_anything_is_loaded(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalModel, "load", lambda *_: pytest.fail("loaded"))
    for bits, said in ((2.5, r"budget\.bits=2\.5 cannot be met: .* takes at least [0-9.]+ bits"), (20.0, None)):
        experiment = replace(made(tiny_folder, {}), compression=Allocated(Rtn(group_size=4), Uniform(bits=bits)))
        if said is None:
            experiment.check()
        else:
            with pytest.raises(BadInput, match=said):
                experiment.check()
