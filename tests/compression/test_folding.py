"""Factors of a layer's inputs, moved into what makes them: the network stays the same, and says where they went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from helpers.layers import windows
from helpers.networks import build_network, logits_of
from knowledge_compression.compression.calibrated import Solved
from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.compression.methods.awq import Awq, InputSizes
from knowledge_compression.compression.methods.smoothquant import LargestInputs, SmoothQuant
from knowledge_compression.models import Model, Target

EVERYTHING = Target("all", ["encoder_att", "decoder_self_att", "cross_att", "ff", "experts", "shared_experts"])
ATTENTION = Target("att", ["encoder_att", "decoder_self_att"])


@dataclass(frozen=True)
class UnroundedAwq(Awq):
    """AWQ but for the rounding: weights multiplied by factors, and inputs divided by them."""

    group_size: int | None = None
    fold: bool = True
    forward_dtype: str = "float32"

    def solve(self, weight: torch.Tensor, statistics: InputSizes, heights: Sequence[int]) -> Solved:
        return Solved(weight=weight, plain=weight, factors_in=statistics.divided_by)


@dataclass(frozen=True)
class UnroundedSmoothQuant(SmoothQuant):
    fold: bool = True
    forward_dtype: str = "float32"

    def solve(self, weight: torch.Tensor, statistics: LargestInputs, heights: Sequence[int]) -> Solved:
        return Solved(weight=weight, plain=weight, factors_in=statistics.divided_by)


def places(report: CompressionReport, block: str) -> dict[str, list[str]]:
    """Of one block, where the factors of each layer are, as ends of names."""
    start = f"{block}."
    layers = [layer for layer in report.layers if layer.path.startswith(start)]
    return {layer.path.removeprefix(start): [name.removeprefix(start) for name in layer.factors_in] for layer in layers}


NORM_AND_BIAS = ["self_attn_layer_norm.weight", "self_attn_layer_norm.bias"]
VALUES = ["self_attn.v_proj.weight"]
# Of a block, where the factors of each layer's inputs go; what is not named has no place for them.
WANTED: dict[str, tuple[str, dict[str, list[str]]]] = {
    "llama": (
        "model.layers.1",
        {f"self_attn.{one}_proj": ["input_layernorm.weight"] for one in "qkv"}
        | {f"mlp.{one}_proj": ["post_attention_layernorm.weight"] for one in ("gate", "up")}
        | {"self_attn.o_proj": VALUES, "mlp.down_proj": ["mlp.up_proj.weight"]},
    ),
    "qwen2": (  # with biases
        "model.layers.0",
        {f"self_attn.{one}_proj": ["input_layernorm.weight"] for one in "qkv"}
        | {f"mlp.{one}_proj": ["post_attention_layernorm.weight"] for one in ("gate", "up")}
        | {"self_attn.o_proj": [*VALUES, "self_attn.v_proj.bias"], "mlp.down_proj": ["mlp.up_proj.weight"]},
    ),
    "opt": (  # ReLU lets positive factors through
        "model.decoder.layers.1",
        {f"self_attn.{one}_proj": NORM_AND_BIAS for one in "qkv"}
        | {"self_attn.out_proj": [*VALUES, "self_attn.v_proj.bias"]}
        | {"fc1": ["final_layer_norm.weight", "final_layer_norm.bias"], "fc2": ["fc1.weight", "fc1.bias"]},
    ),
    "gpt2": (  # the last third of one matrix makes the values; GELU lets no factors through
        "transformer.h.0",
        {"attn.c_attn": ["ln_1.weight", "ln_1.bias"], "mlp.c_fc": ["ln_2.weight", "ln_2.bias"]}
        | {"attn.c_proj": ["attn.c_attn.weight", "attn.c_attn.bias"]},
    ),
    "bert": (  # its norms are read by the residual too
        "bert.encoder.layer.0",
        {"attention.output.dense": ["attention.self.value.weight", "attention.self.value.bias"]},
    ),
    "t5": (
        "decoder.block.1",
        {f"layer.0.SelfAttention.{one}": ["layer.0.layer_norm.weight"] for one in "qkv"}
        | {"layer.0.SelfAttention.o": ["layer.0.SelfAttention.v.weight"]}
        | {"layer.1.EncDecAttention.q": ["layer.1.layer_norm.weight"]}
        | {"layer.1.EncDecAttention.o": ["layer.1.EncDecAttention.v.weight"]}
        | {f"layer.2.DenseReluDense.wi_{one}": ["layer.2.layer_norm.weight"] for one in (0, 1)}
        | {"layer.2.DenseReluDense.wo": ["layer.2.DenseReluDense.wi_1.weight"]},
    ),
    "qwen3_moe": (  # router and experts read one norm; an expert's second half makes what its last matrix reads
        "model.layers.0",
        {f"self_attn.{one}_proj": ["input_layernorm.weight"] for one in "qkv"}
        | {"self_attn.o_proj": VALUES}
        | {f"mlp.experts.down_proj.{number}": ["mlp.experts.gate_up_proj"] for number in range(4)},
    ),
}


@pytest.mark.parametrize("method", [UnroundedAwq(), UnroundedSmoothQuant()], ids=["awq", "smoothquant"])
@pytest.mark.parametrize("architecture", WANTED)
def test_moving_factors_leaves_the_answers(architecture: str, method: Any, tiny_tokenizer: Any) -> None:
    model = Model(build_network(architecture), tiny_tokenizer, architecture)
    before = logits_of(model)
    targets = EVERYTHING.select(model)
    weights = {layer.path: layer.weight.clone() for layer in targets}
    report = method.compress(model, targets, windows(6, 16))
    block, wanted = WANTED[architecture]
    found = places(report, block)
    assert {path: where for path, where in found.items() if where} == wanted
    changed = {layer.path for layer in targets if not torch.equal(layer.weight, weights[layer.path])}
    assert changed >= {f"{block}.{path}" for path in wanted}
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("missing", ["q_proj", "v_proj"])
def test_a_norm_that_something_else_reads_is_left_alone(missing: str, tiny_tokenizer: Any) -> None:
    model = Model(build_network("llama"), tiny_tokenizer, "llama")
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    targets = ATTENTION.select(model)
    some = type(targets)([layer for layer in targets if not layer.path.endswith(missing)], model)
    report = UnroundedAwq().compress(model, some, windows(6, 16))
    found = places(report, "model.layers.0")
    # and values that are not compressed are not changed for the layer that reads them
    assert found == {path: VALUES if path.endswith("o_proj") and missing == "q_proj" else [] for path in found}
    after = model.network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "norm" in name or missing in name)


def test_heads_that_share_values_share_factors(tiny_tokenizer: Any) -> None:
    """Four heads of two: the first two read the first value head, so what multiplies them must be the same."""
    network = build_network("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    model = Model(network, tiny_tokenizer, "llama")
    before, attention = logits_of(model), network.model.layers[0].self_attn
    old = attention.o_proj.weight.clone()
    UnroundedSmoothQuant().compress(model, EVERYTHING.select(model), windows(6, 16))
    factors = (
        (attention.o_proj.weight.detach() / old.detach()).median(0).values.view(2, 2, 4)
    )  # pairs, heads of a pair, width
    torch.testing.assert_close(factors[:, 0], factors[:, 1])
    assert float(factors.max() / factors.min()) > 1.05
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_factors_help_and_are_named(tiny_tokenizer: Any) -> None:
    model = Model(build_network("llama", hidden_size=64, intermediate_size=96, head_dim=32), tiny_tokenizer, "llama")
    with torch.no_grad():
        for block in model.network.model.layers:
            block.input_layernorm.weight[::16] *= 30
            block.input_layernorm.weight.copy_(block.input_layernorm.weight.bfloat16())
    report = Awq(group_size=16, bits=3, fold=True).compress(model, EVERYTHING.select(model), windows(6, 16))
    fed_by_norms = [layer for layer in report.layers if layer.path.endswith(("q_proj", "k_proj", "v_proj"))]
    assert all(layer.error_after < 0.7 * layer.error_before for layer in fed_by_norms)  # type: ignore[operator]
    assert report.fallbacks == {} and all(layer.bits == 3 for layer in report.layers)
    for block in model.network.model.layers:  # as narrow as it was
        assert torch.equal(block.input_layernorm.weight, block.input_layernorm.weight.bfloat16().float())
    bert = Model(build_network("bert"), tiny_tokenizer, "bert")
    report = Awq(group_size=16, fold=True).compress(bert, EVERYTHING.select(bert), windows(6, 16))
    assert report.fallbacks == {"no_place_for_factors": 10}
    again = CompressionReport.from_json(report.to_json())
    assert again == report
