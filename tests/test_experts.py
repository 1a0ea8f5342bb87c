"""Experts that transformers keeps in one tensor are layers like others, calibrated on the tokens sent to them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from helpers.networks import MIXTURES, build_network, logits_of
from knowledge_compression.compression.methods.awq import Awq
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.hqq import Hqq
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.nf4 import Nf4
from knowledge_compression.compression.methods.random_pruning import RandomPruning
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.compression.methods.structured import Structured
from knowledge_compression.compression.methods.wanda import Wanda
from knowledge_compression.compression.walk import blocks
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target
from knowledge_compression.models.families import EXPERTS, FF, SHARED_EXPERTS
from knowledge_compression.models.saving import save_checkpoint
from knowledge_compression.models.targets import linear_layers

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
        assert report[name].tokens == len(inputs) >= blocks.FEWEST_TOKENS and not report[name].fallbacks
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


def test_modules_are_not_put_in_the_place_of_experts() -> None:
    model = mixture("mixtral")
    before = snapshot(model)
    with pytest.raises(BadInput, match=r"which 16 of the 24 targets are not, e\.g\. model\.layers\.0\.mlp\.experts"):
        Int8Dynamic().compress(model, EVERYTHING.select(model), None)
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
