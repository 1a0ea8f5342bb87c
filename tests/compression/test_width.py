"""Width pruning: which channels and heads go, what the others become, and what stock transformers makes of it."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.every_type import write_tiny
from helpers.networks import VOCABULARY, build_network, logits_of
from knowledge_compression.compression.kept import KeptModels
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.pipeline import Pipeline
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.width import Width
from knowledge_compression.compression.solve.columns import damped, least_missed, refitted
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.saving import save_checkpoint

ATT = Target("att", ["encoder_att", "decoder_self_att", "cross_att"])
FF = Target("ff", ["ff", "experts"])
ALL = Target("all", [*ATT.roles, *FF.roles])
TEXT = torch.randint(7, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}


@pytest.fixture
def made(tiny_tokenizer: Any) -> Any:
    return lambda kind, **more: Model(build_network(kind, **more), tiny_tokenizer, kind)


def problem(seed: int, outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight and second moments of correlated inputs, float64."""
    draw = np.random.default_rng(seed)
    values = draw.normal(size=(64, inputs)) @ draw.normal(size=(inputs, inputs))
    return draw.normal(size=(outputs, inputs)), values.T @ values / 64 + 0.1 * np.eye(inputs)


def best_error(weight: np.ndarray, moments: np.ndarray, kept: list[int]) -> float:
    """The squared output error that the best values of some columns leave, by numpy's least squares."""
    root = np.linalg.cholesky(moments).T
    wanted = root @ weight.T
    found = np.linalg.lstsq(root[:, kept], wanted, rcond=None)[0]
    return float(((wanted - root[:, kept] @ found) ** 2).sum())


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_each_unit_that_goes_is_the_one_that_is_missed_least(seed: int, width: int) -> None:
    units, count = 6, 3
    weight, moments = problem(seed, 5, units * width)
    left = list(range(units))
    for _ in range(count):  # try every unit, with a least-squares fit for each
        columns = {u: [c for v in left if v != u for c in range(v * width, (v + 1) * width)] for u in left}
        left.remove(min(left, key=lambda u: best_error(weight, moments, columns[u])))
    gone = least_missed(torch.from_numpy(weight), torch.from_numpy(moments), width, count)
    assert gone.tolist() == sorted(set(range(units)) - set(left))


def test_no_other_values_of_the_columns_that_stay_are_better() -> None:
    weight, moments = problem(7, 4, 8)
    for kept in combinations(range(8), 5):
        new = refitted(torch.from_numpy(weight), torch.from_numpy(moments), torch.tensor(kept)).numpy()
        difference = weight.copy()
        difference[:, kept] -= new
        error = float(np.einsum("oi,ij,oj->", difference, moments, difference))
        assert error == pytest.approx(best_error(weight, moments, list(kept)), rel=1e-9)


def test_biases_and_columns_are_fitted_together(made: Any) -> None:
    """To what ordinary least squares with an intercept gives, on the inputs that the layer sees."""
    model, dense = made("bert"), made("bert")
    seen: list[torch.Tensor] = []
    output = dense.network.bert.encoder.layer[0].output.dense
    output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, 1)))
    with torch.no_grad():
        dense.network(input_ids=TEXT)
    Width(0.5, damping=1e-9).compress(model, FF.select(model), TEXT)
    new = model.network.bert.encoder.layer[0].output.dense
    inputs = seen[0].double().numpy()
    wanted = inputs @ output.weight.detach().double().numpy().T + output.bias.detach().double().numpy()
    up, narrow = (m.network.bert.encoder.layer[0].intermediate.dense.weight for m in (dense, model))
    kept = [int((up == row).all(1).nonzero()) for row in narrow]
    with_one = np.concatenate([inputs[:, kept], np.ones((len(inputs), 1))], 1)
    fitted = np.linalg.lstsq(with_one, wanted, rcond=None)[0]
    assert np.abs(new.weight.detach().numpy() - fitted[:-1].T).max() < 2e-3
    assert np.abs(new.bias.detach().numpy() - fitted[-1]).max() < 2e-3


@pytest.mark.parametrize("importance", ["wanda", "fluctuation"])
def test_the_published_scores_by_hand(importance: str, made: Any) -> None:
    model, dense = made("llama"), made("llama")
    seen: list[torch.Tensor] = []
    down = dense.network.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, 1)))
    with torch.no_grad():
        dense.network(input_ids=TEXT)
    Width(0.25, importance=importance, compensation="none").compress(model, FF.select(model), TEXT)
    weight, inputs = down.weight.detach().double().numpy(), seen[0].double().numpy()
    scores = []
    for channel in range(32):
        column, values = weight[:, channel], inputs[:, channel]
        if importance == "wanda":
            scores.append(np.abs(column).sum() * np.sqrt((values**2).mean()))
        else:
            scores.append((column**2).sum() * values.var())
    kept = sorted(np.argsort(scores)[8:])
    up = dense.network.model.layers[0].mlp.up_proj.weight
    assert torch.equal(model.network.model.layers[0].mlp.up_proj.weight, up[kept])
    assert torch.equal(model.network.model.layers[0].mlp.down_proj.weight, down.weight[:, kept])


CASES = [
    ("llama", ALL, HEADS), ("llama", ATT, HEADS), ("qwen2", ALL, HEADS), ("gemma3_text", ALL, HEADS),
    ("bert", FF, {}), ("t5", FF, {}), ("bart", FF, {}), ("gpt2", FF, {}), ("opt", FF, {}), ("mixtral", ATT, HEADS),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "target", "more"), CASES)
def test_what_is_left_is_smaller_as_promised_and_read_by_stock_transformers(
    kind: str, target: Target, more: dict[str, Any], made: Any, tmp_path: Path
) -> None:
    model = made(kind, **more)
    targets = target.select(model)
    before, weights = model.parameter_count(), targets.parameters
    report = Width(0.5).compress(model, targets, TEXT)
    assert report.sparsity == pytest.approx(0.5) and targets.parameters == weights - report.removed
    assert report.removed <= before - model.parameter_count() <= 1.2 * report.removed  # biases of what is gone
    assert report.smaller.parameters == model.parameter_count()
    for layer in report.layers:
        if layer.error_after is not None:
            assert layer.error_after < layer.error_before
    save_checkpoint(model, tmp_path / "model")
    read = type(model.network).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits_of(model), logits_of(Model(read, model.tokenizer, "read")))


def test_zeros_in_the_place_of_what_went_compute_the_same(made: Any) -> None:
    """The narrow network is the whole one whose lost channels and heads say nothing."""
    model, whole = made("llama", **HEADS), made("llama", **HEADS)
    Width(0.5, compensation="none").compress(model, ALL.select(model), TEXT)
    with torch.no_grad():
        for narrow, block in zip(model.network.model.layers, whole.network.model.layers, strict=True):
            for part, rows, writer in (("mlp", "up_proj", "down_proj"), ("self_attn", "q_proj", "o_proj")):
                there = getattr(getattr(narrow, part), rows).weight
                lost = [
                    i
                    for i, row in enumerate(getattr(getattr(block, part), rows).weight)
                    if not (there == row).all(1).any()
                ]
                getattr(getattr(block, part), writer).weight[:, lost] = 0
                assert len(lost) == len(there)
    assert torch.allclose(logits_of(model), logits_of(whole), atol=1e-5)


def test_whole_groups_of_heads_go(made: Any) -> None:
    model = made("llama", **HEADS)
    Width(0.5).compress(model, ATT.select(model), TEXT)
    config = model.network.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 4)
    past = model.network(input_ids=TEXT[:, :-1], use_cache=True).past_key_values
    assert past.layers[0].keys.shape[1] == 2
    last = model.network(input_ids=TEXT[:, -1:], past_key_values=past).logits[:, -1]
    assert torch.allclose(model.network(input_ids=TEXT).logits[:, -1], last, atol=1e-5)


def test_channels_make_up_for_what_heads_cannot_hit(made: Any) -> None:
    model = made("llama", intermediate_size=64, **HEADS)
    targets = ALL.select(model)
    report = Width(0.4, multiple=2).compress(model, targets, TEXT)  # 3.2 of 8 heads; 5 or 6 would not divide 16
    assert model.network.config.num_key_value_heads == 2 and model.network.config.intermediate_size % 2 == 0
    a_channel = 3 * 16 * 2
    assert abs(report.removed - 0.4 * (report.removed + targets.parameters)) <= a_channel * 2


@pytest.mark.parametrize("last", [Rtn(bits=4), Int8Dynamic("per_channel")])
def test_it_is_found_again_after_another_step(
    last: Any, made: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path))
    method = Pipeline([Width(0.5), last])
    seen = []
    for _ in range(2):
        model = made("bert")
        targets = FF.select(model)
        compress = partial(method.compress, model, targets, TEXT)
        report, found = KeptModels(1.0).compress("a", model, targets, method, compress, afresh=False)
        seen.append((found, report, logits_of(model)))
    assert [found for found, _, _ in seen] == [False, True]
    assert seen[0][1] == seen[1][1] and torch.equal(seen[0][2], seen[1][2])
    assert {(layer.parameters, layer.removed, layer.cut) for layer in seen[0][1].layers} == {(512, 256, 256)}


@pytest.mark.parametrize(
    ("kind", "target", "settings", "said"),
    [
        ("bert", ATT, {}, "choose target=ff"),
        ("t5", ALL, {}, "choose target=ff"),
        ("gpt2", ATT, {}, "not four matrices"),
        ("mixtral", FF, {}, "experts"),
        ("llama", ATT, {}, "one group of heads; the model has one"),
        ("llama", FF, {"sparsity": 0.01}, "one channel; that is sparsity=0.0312"),
        ("llama", FF, {"compensation": "bias"}, "has no bias"),
        ("llama", Target("ff", ["ff"], blocks=[0]), {}, "without target.blocks"),
        ("llama", Target("final", ["final"]), {}, "does not belong to a complete one"),
    ],
)
def test_what_cannot_be_narrower_is_one_line(
    kind: str, target: Target, settings: dict[str, Any], said: str, made: Any
) -> None:
    model = made(kind)
    before = logits_of(model)
    with pytest.raises(BadInput, match=said):
        Width(**({"sparsity": 0.5} | settings)).compress(model, target.select(model), TEXT)
    assert torch.equal(before, logits_of(model))


def test_a_network_without_heads_is_one_line(tmp_path: Path) -> None:
    write_tiny("mamba2", tmp_path)
    model = LocalModel("local", str(tmp_path)).load("cpu", "float32")
    with pytest.raises(BadInput, match="does not belong to a complete one"):
        Width(0.5).compress(model, Target("mixer", ["mixer"]).select(model), TEXT)


def test_damping_is_relative_to_the_mean_of_the_diagonal() -> None:
    assert damped(torch.diag(torch.tensor([1.0, 3.0])), 0.1).tolist() == [[1.2, 0.0], [0.0, 3.2]]
