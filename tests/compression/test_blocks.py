"""The block-by-block walk: who sees which inputs, what is shared, and what each block is compressed on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch

from helpers.layers import EVERYTHING, windows
from helpers.networks import logits_of
from knowledge_compression.compression.layer_reports import LayerReport
from knowledge_compression.compression.walk.blocks import LayerInputs, Statistics, WalkSettings, compress_blocks
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target


@dataclass
class Kept(Statistics):
    """All inputs of a layer, joined."""

    seen: list[torch.Tensor] = field(default_factory=list)

    def update(self, inputs: LayerInputs) -> None:
        self.seen.append(inputs.values.clone())

    @property
    def inputs(self) -> torch.Tensor:
        return torch.cat(self.seen)


@dataclass
class Shrinking:
    """Scales every weight, and remembers which layers shared which inputs."""

    factor: float = 0.5
    groups: list[tuple[list[str], Kept]] = field(default_factory=list)

    def observe(self, in_features: int, device: torch.device) -> Kept:
        return Kept()

    def prepare(self, block) -> None:
        pass

    def shrink(self, layers, statistics: Kept) -> list[LayerReport]:
        self.groups.append(([layer.path for layer in layers], statistics))
        for layer in layers:
            assert statistics.inputs.shape[1] == layer.weight.shape[1]
            layer.weight.mul_(self.factor)
        return [LayerReport.of(layer) for layer in layers]


def select(model: Model, target: Target = EVERYTHING):
    model.untie_head()
    return target.select(model)


def inputs_in_plain_forward(model: Model, paths: list[str]) -> dict[str, torch.Tensor]:
    """What the layers read when the network, as it stands, is run on the calibration text."""
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    hooks = [
        model.network.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: seen[path].append(args[0].reshape(-1, args[0].shape[-1]).clone())
        )
        for path in paths
    ]
    ids = windows()
    with torch.no_grad():
        if model.family == "encoder_decoder":
            start = torch.full_like(ids[:, :1], model.network.config.decoder_start_token_id)
            model.network(input_ids=ids[:, :6], decoder_input_ids=torch.cat([start, ids[:, 6:-1]], 1))
        else:
            model.network(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(rows) for path, rows in seen.items()}


def test_every_target_is_compressed_once_and_the_network_is_left_whole(any_tiny_model: Model) -> None:
    targets, method = select(any_tiny_model), Shrinking()
    before = {layer.path: layer.weight.clone() for layer in targets}
    reports = compress_blocks(any_tiny_model, targets, windows(), method, tokens_per_batch=24)
    assert sorted(report.path for report in reports) == sorted(before)
    for layer in targets:
        assert torch.equal(layer.weight, before[layer.path] * 0.5)
    assert not any("forward" in vars(module) for module in any_tiny_model.network.modules())
    assert logits_of(any_tiny_model).isfinite().all()


def test_layers_see_what_they_read_in_the_compressed_network(any_tiny_model: Model) -> None:
    """With a compression that changes nothing, the walk shows every layer what a plain forward pass shows it."""
    targets, method = select(any_tiny_model), Shrinking(factor=1.0)
    compress_blocks(any_tiny_model, targets, windows(), method, WalkSettings(forward_dtype="float32"))
    plain = inputs_in_plain_forward(any_tiny_model, [layer.path for layer in targets])
    for paths, statistics in method.groups:
        for path in paths:
            torch.testing.assert_close(statistics.inputs, plain[path], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "bart", "t5", "gpt2", "bert"])
def test_a_block_is_compressed_on_what_the_compressed_blocks_before_it_give(tiny_model, architecture) -> None:
    model = tiny_model(architecture)
    targets, method = select(model), Shrinking(factor=0.7)
    compress_blocks(model, targets, windows(), method, WalkSettings(true_sequential=True, forward_dtype="float32"))
    plain = inputs_in_plain_forward(model, [layer.path for layer in targets])  # of the compressed network
    for paths, statistics in method.groups:
        for path in paths:  # true to the sequence: each saw the very inputs that it gets in the finished network
            torch.testing.assert_close(statistics.inputs, plain[path], rtol=1e-4, atol=1e-5)


def test_in_sequence_every_linear_is_run_once_but_for_one_window(tiny_model) -> None:
    """What tells which linears share an input is the first window; the rest of the text goes through but once."""
    model, method = tiny_model("llama"), Shrinking()
    targets, ids, read = select(model), windows(), Counter()
    for layer in targets:
        layer.module.register_forward_pre_hook(
            lambda _, args, path=layer.path: read.update({path: args[0].shape[:-1].numel()})
        )
    compress_blocks(model, targets, ids, method, WalkSettings(true_sequential=True))
    last = targets[-1].path  # a linear outside the blocks, after which nothing is left to run
    assert {path: count for path, count in read.items() if path != last} == {
        layer.path: ids.numel() + ids.shape[1] for layer in targets if layer.path != last
    }


def test_one_window_will_do(tiny_model) -> None:
    model, method = tiny_model("llama"), Shrinking()
    compress_blocks(model, select(model), windows(samples=1), method)
    assert {len(statistics.inputs) for _, statistics in method.groups} == {windows().shape[1]}


def test_linears_with_one_input_share_one_statistic(tiny_model) -> None:
    def shared(architecture: str) -> list[list[str]]:
        method = Shrinking()
        model = tiny_model(architecture)
        compress_blocks(model, select(model), windows(), method)
        return [[path.rsplit(".", 1)[-1] for path in paths] for paths, _ in method.groups]

    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert shared("llama") == [*block, *block, ["lm_head"]]
    encoder = [["q", "k", "v"], ["o"], ["wi_0", "wi_1"], ["wo"]]
    decoder = [["q", "k", "v"], ["o"], ["q"], ["k", "v"], ["o"], ["wi_0", "wi_1"], ["wo"]]
    assert shared("t5") == [*encoder, *encoder, *decoder, *decoder, ["lm_head"]]


def test_a_shared_block_is_observed_over_all_its_uses(tiny_model) -> None:
    model, method = tiny_model("albert"), Shrinking()
    compress_blocks(model, select(model), windows(), method)
    tokens = {paths[0].rsplit(".", 1)[-1]: len(statistics.inputs) for paths, statistics in method.groups}
    assert tokens["query"] == tokens["ffn_output"] == 2 * windows().numel()
    assert tokens["decoder"] == windows().numel()


def test_only_the_chosen_linears_are_touched(tiny_model) -> None:
    model, method = tiny_model("llama"), Shrinking()
    targets = select(model, Target("ff", ["ff"]))
    compress_blocks(model, targets, windows(), method)
    assert {path for paths, _ in method.groups for path in paths} == {layer.path for layer in targets}


def test_bad_calibration_is_refused(tiny_model) -> None:
    model = tiny_model("gpt2")
    targets = select(model)
    with pytest.raises(BadInput, match="no calibration text"):
        compress_blocks(model, targets, None, Shrinking())
    with pytest.raises(BadInput, match="128 positions"):
        compress_blocks(model, targets, windows(length=129), Shrinking())
    with pytest.raises(BadInput, match="forward_dtype"):
        compress_blocks(model, targets, windows(), Shrinking(), WalkSettings(forward_dtype="int3"))
    with pytest.raises(BadInput, match="set one of them to false"):
        compress_blocks(model, targets, windows(), Shrinking(), WalkSettings(by_influence=True, true_sequential=True))


def test_a_failing_method_leaves_the_network_runnable(tiny_model) -> None:
    class Failing(Shrinking):
        def shrink(self, layers, statistics):
            raise RuntimeError("stop here")

    model = tiny_model("llama")
    before = logits_of(model)
    with pytest.raises(RuntimeError, match="stop here"):
        compress_blocks(model, select(model), windows(), Failing())
    assert torch.equal(logits_of(model), before)


@dataclass
class Influential(Shrinking):
    """Remembers the influence of every token."""

    def observe(self, in_features: int, device: torch.device) -> Kept:
        kept = Kept()
        kept.influence = []
        kept.update = lambda inputs: (kept.seen.append(inputs.values), kept.influence.append(inputs.influence))
        return kept


def test_influence_is_the_squared_derivative_of_the_relative_output(tiny_model) -> None:
    """For a linear outside the blocks it is known in closed form: features over mean square of the output."""
    model, method = tiny_model("llama"), Influential(factor=1.0)
    compress_blocks(model, select(model), windows(), method, WalkSettings(by_influence=True, forward_dtype="float32"))
    paths, statistics = method.groups[-1]
    assert paths == ["lm_head"]
    output = statistics.inputs @ model.network.lm_head.weight.T
    expected = output.shape[1] / output.square().mean(-1)
    torch.testing.assert_close(torch.cat(statistics.influence), expected, rtol=1e-4, atol=1e-6)


def test_influence_in_a_causal_block_grows_with_the_tokens_that_attend(tiny_model) -> None:
    """The first token's key and value reach every later token, the last one's only itself."""
    model, method = tiny_model("llama"), Influential(factor=1.0)
    compress_blocks(
        model,
        select(model, Target("att", ["decoder_self_att"])),
        windows(32, 16),
        method,
        WalkSettings(by_influence=True),
    )
    paths, statistics = method.groups[0]
    assert paths[0].endswith("q_proj")
    by_position = torch.cat(statistics.influence).view(32, 16).mean(0)
    assert by_position[0] > 2 * by_position[-1]


def test_every_architecture_tells_the_influence_of_its_tokens(any_tiny_model: Model) -> None:
    targets, method = select(any_tiny_model), Influential(factor=1.0)
    compress_blocks(any_tiny_model, targets, windows(), method, WalkSettings(by_influence=True))
    for _, statistics in method.groups:
        influence = torch.cat(statistics.influence)
        assert influence.shape == (len(statistics.inputs),)
        assert influence.isfinite().all()
        assert (influence >= 0).all()
        assert influence.sum() > 0


def test_inputs_that_are_not_finite_are_refused_by_name(tiny_model) -> None:
    model = tiny_model("llama")
    model.network.model.layers[0].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(BadInput, match=r"layers\.0\.self_attn\.q_proj reads values that are not finite"):
        compress_blocks(model, select(model), windows(), Shrinking())
