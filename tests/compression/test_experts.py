"""Experts that transformers keeps in one tensor are layers like others, calibrated on the tokens sent to them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers.networks import MIXTURES, build_network, logits_of
from knowledge_compression.compression.formats.int8_linear import Int8Linear
from knowledge_compression.compression.kept import KeptModels
from knowledge_compression.compression.methods.awq import Awq
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.hqq import Hqq
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.int8_static import Int8Static
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.nf4 import Nf4
from knowledge_compression.compression.methods.random_pruning import RandomPruning
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.compression.methods.structured import Structured
from knowledge_compression.compression.methods.wanda import Wanda
from knowledge_compression.compression.walk import blocks, groups
from knowledge_compression.compression.walk.expert_inputs import one_expert_after_the_other
from knowledge_compression.compression.walk.layer_inputs import reading
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target
from knowledge_compression.models.families import EXPERTS, FF, ROUTER, SHARED_EXPERTS
from knowledge_compression.models.replaced import ReplacedExperts
from knowledge_compression.models.saving import save_checkpoint
from knowledge_compression.models.targets import Targets, linear_layers
from knowledge_compression.recovery.lora import Lora
from knowledge_compression.training import TrainingSettings

EVERYTHING = Target("all", ["decoder_self_att", FF, EXPERTS, SHARED_EXPERTS, "mixer"])
ONLY = Target("experts", [EXPERTS])


def mixture(name: str, tokenizer: object = None) -> Model:
    return Model(build_network(name), tokenizer, name)  # type: ignore[arg-type]


def text(samples: int = 4, length: int = 32) -> Tensor:
    return torch.randint(7, 60, (samples, length), generator=torch.Generator().manual_seed(0))


def snapshot(model: Model) -> dict[str, Tensor]:
    return {layer.path: layer.weight.clone() for layer in linear_layers(model)}


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_an_expert_is_a_writable_view_of_its_inputs_and_outputs(name: str) -> None:
    model = mixture(name)
    before = logits_of(model)
    layers = list(ONLY.select(model))
    banks = [p for path, p in model.network.named_parameters() if ".experts." in path and p.dim() == 3]
    assert sum(layer.parameters for layer in layers) == sum(bank.numel() for bank in banks)
    width = model.network.config.hidden_size
    for layer in layers:
        assert layer.weight.shape[0 if "down" in layer.path else 1] == width
    layers[0].weight.zero_()
    owner = dict(model.network.named_parameters())[layers[0].weight_name]
    assert (owner[0] == 0).all() and not (owner[1] == 0).all()
    for layer in layers[1:]:
        layer.weight.zero_()
    assert not torch.allclose(logits_of(model), before)


def test_a_threshold_over_all_layers_ranks_experts_too() -> None:
    model = mixture("mixtral")
    targets = EVERYTHING.select(model)
    everything = torch.cat([layer.weight.flatten() for layer in targets]).abs()
    report = Magnitude(0.5).compress(model, targets, None)
    assert report.removed == round(0.5 * len(everything))
    limit = everything.sort().values[report.removed - 1]
    for layer in targets:
        assert (layer.weight != 0).sum() == layer.parameters - next(
            one.removed for one in report.layers if one.path == layer.path
        )
        assert layer.weight[layer.weight != 0].abs().min() > limit


@pytest.mark.parametrize("name", sorted(MIXTURES))
@pytest.mark.parametrize(
    "method",
    [
        Magnitude(0.5, pattern="2:4"),
        Structured(0.25),
        RandomPruning(0.5),
        Rtn(bits=4, group_size=None),
        Nf4(),
        Hqq(bits=4, group_size=8),
        Gptq(bits=4),
        Gptq(bits=4, true_sequential=False),
        SparseGpt(0.5),
        Wanda(0.5),
        Awq(bits=4, group_size=8),
    ],
    ids=lambda method: f"{method.name}-{getattr(method, 'true_sequential', '')}",
)
def test_every_method_that_writes_weights_takes_experts(name: str, method: object) -> None:
    model = mixture(name)
    before = snapshot(model)
    targets = ONLY.select(model)
    report = method.compress(model, targets, text())  # type: ignore[attr-defined]
    assert {layer.path for layer in report.layers} == {layer.path for layer in targets}
    for path, weight in snapshot(model).items():
        assert torch.equal(weight, before[path]) == (path not in {layer.path for layer in targets})
    assert logits_of(model).isfinite().all()


def plain_inputs(model: Model, path: str, ids: Tensor) -> dict[int, Tensor]:
    """What each expert of a bank reads, worked out from what the bank is called with."""
    seen: list[tuple[Tensor, Tensor]] = []
    bank = model.network.get_submodule(path)
    handle = bank.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    with torch.no_grad():
        model.network(input_ids=ids)
    handle.remove()
    ((states, chosen),) = seen
    return {expert: states[(chosen == expert).any(dim=1)] for expert in range(bank.num_experts)}


@pytest.mark.parametrize("sequential", [True, False])
def test_gptq_of_an_expert_is_gptq_of_a_linear_that_reads_its_tokens(sequential: bool) -> None:
    model, untouched = mixture("mixtral"), mixture("mixtral")
    path, ids = "model.layers.0.mlp.experts", text()
    method = Gptq(bits=3, true_sequential=sequential, forward_dtype="float32")
    targets = ONLY.select(model)
    report = {layer.path: layer for layer in method.compress(model, targets, ids).layers}
    read = plain_inputs(untouched, path, ids)
    assert sum(map(len, read.values())) == 2 * ids.numel()
    for expert, inputs in read.items():
        weight = untouched.network.get_submodule(path).gate_up_proj[expert].detach()
        statistics = method.observe(weight.shape[1], weight.device)
        statistics.update(blocks.LayerInputs(inputs))
        solved = method.solve(weight.float(), statistics, [len(weight)])
        assert solved.quantized is not None
        name = f"{path}.gate_up_proj.{expert}"
        found = model.network.get_submodule(path).gate_up_proj[expert]
        assert report[name].tokens == len(inputs) >= groups.FEWEST_TOKENS and not report[name].fallbacks
        torch.testing.assert_close(found, solved.quantized.dequantize())


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_expert_without_tokens_is_named_and_rounded_to_the_nearest(name: str, sequential: bool) -> None:
    model, rounded = mixture(name), mixture(name)
    method = Gptq(bits=3, true_sequential=sequential, clip="minmax", desc_act=False)
    report = method.compress(model, ONLY.select(model), text(1, 2))
    Rtn(
        bits=3, group_size=method.group_size, symmetric=method.symmetric, scale_bits=method.scale_bits, clip=method.clip
    ).compress(rounded, ONLY.select(rounded), None)
    assert set(report.fallbacks) == {"no_tokens", "few_tokens"}
    assert all((layer.tokens == 0) == ("no_tokens" in layer.fallbacks) for layer in report.layers)
    assert [layer.path for layer in report.layers] == [layer.path for layer in ONLY.select(model)]
    for ours, theirs in zip(ONLY.select(model), ONLY.select(rounded), strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight)


def test_the_walk_leaves_the_way_in_which_experts_run_as_it_was() -> None:
    model = mixture("mixtral")
    before = model.network.config._experts_implementation
    Wanda(0.5).compress(model, ONLY.select(model), text())
    assert model.network.config._experts_implementation == before


@pytest.mark.parametrize("name", sorted(MIXTURES))
def test_saved_and_read_back_they_say_the_same(name: str, tiny_tokenizer: object, tmp_path: Path) -> None:
    model = mixture(name, tiny_tokenizer)
    Magnitude(0.5).compress(model, EVERYTHING.select(model), None)
    save_checkpoint(model, tmp_path / name)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
    assert torch.equal(logits_of(Model(again, tiny_tokenizer, name)), logits_of(model))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(MIXTURES))
@pytest.mark.parametrize("method", [Int8Dynamic("per_channel"), Int8Dynamic("per_tensor"), Int8Static()], ids=str)
def test_a_bank_of_experts_multiplies_in_int8(name: str, method: Any, tiny_tokenizer: object, tmp_path: Path) -> None:
    model = mixture(name, tiny_tokenizer)
    before, targets = logits_of(model), EVERYTHING.select(model)
    weights = {layer.path: layer.weight.clone() for layer in targets}
    report = method.compress(model, targets, text())
    assert {layer.path for layer in report.layers} == weights.keys()
    assert sum(parameter.numel() for parameter in model.network.parameters() if parameter.dim() == 3) == 0
    after = logits_of(model)
    assert 0 < (after - before).norm() < 0.2 * before.norm()
    for layer in linear_layers(model):  # found again by the same paths
        if layer.path in weights:
            assert isinstance(layer.module, Int8Linear) and layer.role in EVERYTHING.roles
            torch.testing.assert_close(
                layer.weight, weights[layer.path], atol=float(layer.weight.abs().max() / 100), rtol=0
            )
    save_checkpoint(model, tmp_path / name)
    again = dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters())
    for path in (path for path, parameter in again.items() if parameter.dim() == 3):
        held = model.network.get_submodule(path)
        assert (
            isinstance(held, ReplacedExperts)
            and torch.equal(held.weight, again[path])
            and held.shape == held.weight.shape
        )


def test_an_int8_bank_gives_what_int8_layers_of_its_experts_give() -> None:
    model, plain = mixture("mixtral"), mixture("mixtral")
    path = "model.layers.0.mlp.experts"
    Int8Dynamic("per_channel").compress(model, ONLY.select(model), None)
    bank, weights = model.network.get_submodule(path), plain.network.get_submodule(path)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, 16, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
    shares = torch.rand(9, 2, generator=generator)
    expected = torch.zeros_like(states)
    for token in range(9):
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            up = Int8Linear(weights.gate_up_proj[expert].detach(), None)
            down = Int8Linear(weights.down_proj[expert].detach(), None)
            gate, value = up(states[token][None]).chunk(2, dim=-1)
            expected[token] += share * down(torch.nn.functional.silu(gate) * value)[0]
    with torch.no_grad():
        torch.testing.assert_close(bank(states, chosen, shares), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_int8_bank_is_kept_for_other_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path))
    method, kept = Int8Static(), KeptModels(1.0)
    found = []
    for _ in range(2):
        model = mixture(name)
        targets = EVERYTHING.select(model)
        compress = partial(method.compress, model, targets, text())
        found.append((kept.compress("key", model, targets, method, compress, afresh=False), logits_of(model)))
    ((first, was_there), one), ((second, is_there), other) = found
    assert (was_there, is_there) == (False, True) and torch.equal(one, other)
    assert [layer.path for layer in first.layers] == [layer.path for layer in second.layers]


def test_some_experts_of_a_bank_may_stay_as_they_are() -> None:
    model = mixture("gpt_oss")
    layers = [layer for layer in ONLY.select(model) if layer.path.endswith(".1")]
    Int8Dynamic("per_channel").compress(model, Targets(layers, model), None)
    kinds = {layer.path: type(layer.module) for layer in linear_layers(model) if layer.role == EXPERTS}
    assert {path for path, kind in kinds.items() if kind is Int8Linear} == {layer.path for layer in layers}
    assert len(kinds) == 16 and logits_of(model).isfinite().all()


def test_a_bank_that_is_read_in_another_way_is_refused() -> None:
    model = mixture("mixtral")
    Int8Dynamic().compress(model, ONLY.select(model), None)
    bank = model.network.model.layers[0].mlp.experts.gate_up_proj
    for product in (
        lambda: torch.ones(2, 16) @ bank[0],  # [out, in] as it lies
        lambda: torch.nn.functional.conv1d(torch.ones(1, 16, 2), bank[0]),
        lambda: torch.bmm(torch.ones(4, 2, 16), bank),
    ):
        with pytest.raises(BadInput, match="replaced modules do not support"):
            product()
    torch.testing.assert_close(
        torch.bmm(torch.ones(4, 2, 16), bank.transpose(1, 2)),
        torch.stack([e(torch.ones(2, 16)) for e in bank.children()]),
    )


# Llama 4's is an nn.Linear that also chooses the experts, so its network takes two tensors from it.
@pytest.mark.parametrize(("name", "path"), [("gpt_oss", "mlp"), ("llama4_text", "feed_forward")])
def test_modules_are_not_put_in_the_place_of_routers(name: str, path: str) -> None:
    model = mixture(name)
    before = snapshot(model)
    line = rf"2 of the 2 targets are not linear layers, e\.g\. model\.layers\.0\.{path}\.router"
    with pytest.raises(BadInput, match=line):
        Int8Dynamic().compress(model, Target("router", [ROUTER]).select(model), None)
    assert all(torch.equal(weight, before[path]) for path, weight in snapshot(model).items())


def test_a_dense_model_says_that_it_has_no_experts(tiny_model: Callable[[str], Model]) -> None:
    with pytest.raises(BadInput, match=r"target=experts takes experts, which .* it has decoder_self_att, ff, final"):
        ONLY.select(tiny_model("llama"))


def test_what_a_target_leaves_out_is_told_with_its_share() -> None:
    model = mixture("gpt_oss")
    left_out = {part.path: part for part in ONLY.select(model).left_out}
    biases = left_out["model.layers.*.mlp.experts.down_proj_bias"]
    blocks_only = model.network.model.layers
    whole = sum(parameter.numel() for parameter in blocks_only.parameters() if parameter.dim() > 1)
    here = sum(block.mlp.experts.down_proj_bias.numel() for block in blocks_only)
    assert (biases.parameters, biases.share, biases.inside) == (here, here / whole, True)
    assert left_out["model.layers.*.self_attn.q_proj.weight"].reason == "role"
    touched = sum(layer.parameters for layer in ONLY.select(model))
    assert touched + sum(part.parameters for part in left_out.values()) == whole
    assert not any(part.inside for part in Target("att", ["decoder_self_att"]).select(model).left_out)


def test_a_parameter_that_nothing_explains_is_named() -> None:
    model = mixture("mixtral")
    model.network.model.layers[1].mlp.experts.mystery = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(BadInput, match=r"unknown role: model\.layers\.1\.mlp\.experts\.mystery"):
        ONLY.select(model)


def said(model: Model) -> Tensor:
    return model.network(input_ids=text()).logits


def test_influence_on_experts_is_that_on_linear_layers() -> None:
    """Of a network that multiplies by its whole bank at once too; read off the experts as modules, by hooks."""
    for name in sorted(MIXTURES):
        model, apart = mixture(name), mixture(name)
        layers = {layer.path: layer for layer in ONLY.select(model) if "layers.0." in layer.path}
        for layer in ONLY.select(apart):
            assert layer.expert
            ReplacedExperts.in_place_of(layer.module, layer.expert.parameter, layer.expert.transposed)
        linears = {layer.path: layer for layer in linear_layers(apart) if layer.path in layers}
        assert linears.keys() == layers.keys() and not any(layer.expert for layer in linears.values())
        with one_expert_after_the_other(model.network):
            found = reading(layers, partial(said, model), by_influence=True)
        expected = reading(linears, partial(said, apart), by_influence=True)
        for path in layers:
            inputs = expected[0][path].flatten(0, -2)
            sent = inputs.ne(0).any(dim=-1)  # a whole bank also reads zeros for tokens that are not for an expert
            torch.testing.assert_close(found[0][path], inputs[sent], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found[1][path], expected[1][path][sent], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("quantized", [False, True])
def test_lora_adds_to_every_expert(name: str, quantized: bool) -> None:
    model = mixture(name)
    before, count = logits_of(model), len(ONLY.select(model))
    if quantized:
        Int8Dynamic("per_channel").compress(model, ONLY.select(model), None)
        before = logits_of(model)
    settings = Lora(rank=2, training=TrainingSettings(tokens=64))
    settings.prepare(model)
    network = settings.trainable(model)
    torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=1e-5)  # additions begin at zero
    trained = {path: p for path, p in network.named_parameters() if p.requires_grad and ".experts." in path}
    assert len(trained) == 2 * count
    network(input_ids=text()).logits.square().sum().backward()
    learning = [p for path, p in trained.items() if "lora_B" in path and p.grad is not None and p.grad.any()]
    assert len(learning) > count / 2  # those to which no token was sent have nothing to learn from
