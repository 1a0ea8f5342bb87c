"""Depth pruning: the blocks that go, what stock transformers makes of what is left, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.networks import VOCABULARY, build_network, logits_of
from knowledge_compression.compression.kept import KeptModels
from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.compression.methods.depth import Depth
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.pipeline import Pipeline
from knowledge_compression.compression.solve.grid import quantized_weight
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target
from knowledge_compression.models.saving import save_checkpoint

ALL = Target("all", ["encoder_att", "decoder_self_att", "cross_att", "ff", "experts"])
TEXT = torch.randint(7, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
DEEP = {"num_hidden_layers": 5}


@pytest.fixture
def deep(tiny_tokenizer: Any) -> Callable[..., Model]:
    """A tiny network of five blocks."""
    return lambda kind="llama", **more: Model(build_network(kind, **(DEEP | more)), tiny_tokenizer, f"deep-{kind}")


def states(model: Model) -> list[np.ndarray]:
    """What enters each block of a decoder, and what leaves the last, as transformers records it: ``[tokens, width]``.

    The last state that transformers records is after the final norm, so that norm is taken away.
    """
    model.network.model.norm = nn.Identity()
    with torch.no_grad():
        seen = model.network(input_ids=TEXT, output_hidden_states=True).hidden_states
    return [state.flatten(0, 1).double().numpy() for state in seen]


def cosines(one: np.ndarray, other: np.ndarray) -> list[float]:
    pairs = zip(one, other, strict=True)
    return [float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for a, b in pairs]


def test_influence_is_one_minus_the_cosine_of_a_blocks_input_and_output(deep: Callable[..., Model]) -> None:
    edges, model = states(deep()), deep()
    report = Depth(0.4).compress(model, ALL.select(model), TEXT)
    expected = [1 - float(np.mean(cosines(edges[i], edges[i + 1]))) for i in range(5)]
    measured = report.smaller.measured["influence"]
    assert list(measured) == [f"model.layers.{i}" for i in range(5)]
    assert list(measured.values()) == pytest.approx(expected, abs=1e-5)
    assert set(report.smaller.dropped) == {f"model.layers.{i}" for i in np.argsort(expected)[:2]}


def test_the_angle_is_that_of_a_run_of_neighbours(deep: Callable[..., Model]) -> None:
    edges, model = states(deep()), deep()
    report = Depth(0.4, by="angle").compress(model, ALL.select(model), TEXT)
    expected = [float(np.mean(np.arccos(cosines(edges[i], edges[i + 2])) / math.pi)) for i in range(4)]
    assert list(report.smaller.measured["angle"].values()) == pytest.approx(expected, abs=1e-5)
    first = int(np.argmin(expected))
    assert report.smaller.dropped == [f"model.layers.{first}", f"model.layers.{first + 1}"]


WINDOWED = {"layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"], "sliding_window": 4}


@pytest.mark.parametrize(
    ("kind", "blocks", "more"),
    [("llama", "model.layers", {}), ("gemma3_text", "model.layers", WINDOWED), ("bert", "bert.encoder.layer", {})],
)
def test_it_is_dropping_blocks_by_hand(
    kind: str, blocks: str, more: dict[str, Any], deep: Callable[..., Model], tmp_path: Path
) -> None:
    model, by_hand = deep(kind, **more), deep(kind, **more)
    report = Depth(0.4).compress(model, ALL.select(model), TEXT)
    gone = {int(path.rpartition(".")[2]) for path in report.smaller.dropped}
    stack = by_hand.network.get_submodule(blocks)
    left = nn.ModuleList([block for i, block in enumerate(stack) if i not in gone])
    by_hand.network.set_submodule(blocks, left)
    config = by_hand.network.config
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = [one for i, one in enumerate(config.layer_types) if i not in gone]
    assert torch.equal(logits_of(model, length=12), logits_of(by_hand, length=12))

    save_checkpoint(model, tmp_path / "model")  # any program that knows transformers reads it
    read = type(model.network).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits_of(model), logits_of(Model(read, model.tokenizer, "read")))


def test_the_cache_of_a_shallower_decoder_is_as_deep_as_it(deep: Callable[..., Model]) -> None:
    model = deep()
    Depth(0.4).compress(model, ALL.select(model), TEXT)
    whole = model.network(input_ids=TEXT).logits[:, -1]
    past = model.network(input_ids=TEXT[:, :-1], use_cache=True).past_key_values
    assert len(past.layers) == 3
    last = model.network(input_ids=TEXT[:, -1:], past_key_values=past).logits[:, -1]
    assert torch.allclose(whole, last, atol=1e-5)


def test_t5_keeps_the_biases_of_its_first_block(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """The first block of each stack holds the biases of all; whichever goes, they stay."""
    model = Model(build_network("t5", num_layers=3, num_decoder_layers=4), tiny_tokenizer, "t5")
    biases = model.network.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.clone()
    target = Target("all", ALL.roles, blocks=[0])
    report = Depth(0.9).compress(model, target.select(model), TEXT)
    assert report.smaller.dropped == ["encoder.block.0", "decoder.block.0"]
    assert (model.network.config.num_layers, model.network.config.num_decoder_layers) == (2, 3)
    assert torch.equal(model.network.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, biases)
    save_checkpoint(model, tmp_path / "model")
    read = type(model.network).from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits_of(model), logits_of(Model(read, tiny_tokenizer, "read")))


def test_what_is_promised_is_what_is_left(deep: Callable[..., Model], tmp_path: Path) -> None:
    model = deep()
    targets = ALL.select(model)
    before, weights = model.parameter_count(), targets.parameters
    report = Depth(0.4).compress(model, targets, TEXT)
    norms = 2 * 2 * model.network.config.hidden_size
    assert report.sparsity == pytest.approx(0.4)
    assert before - model.parameter_count() == report.removed + norms == 0.4 * weights + norms
    assert report.smaller.parameters == model.parameter_count()
    assert report.stored_bytes == pytest.approx(4 * model.parameter_count(), rel=0.01)
    assert len(targets) == 3 * 7 and {layer.block for layer in targets} == {0, 1, 2}
    save_checkpoint(model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_size == pytest.approx(report.stored_bytes, abs=6000)
    assert CompressionReport.from_json(report.to_json()) == report


def test_a_step_after_it_works_on_what_is_left_and_the_whole_is_found_again(
    deep: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path))
    method, made = Pipeline([Depth(0.4), Gptq(bits=3)]), []
    for _ in range(2):
        model = deep()
        targets = ALL.select(model)
        compress = partial(method.compress, model, targets, TEXT)
        report, found = KeptModels(1.0).compress("a", model, targets, method, compress, afresh=False)
        made.append((model, report, found))
    (first, report, found), (second, again, found_again) = made
    assert (found, found_again) == (False, True) and again == report
    assert torch.equal(logits_of(first), logits_of(second))
    assert second.network.config.num_hidden_layers == 3
    kept = [layer for layer in report.layers if not layer.cut]
    assert len(report.layers) == 35 and len(kept) == 21 and {layer.bits for layer in kept} == {3.0}
    assert not any(layer.path.startswith(tuple(f"{path}." for path in report.smaller.dropped)) for layer in kept)
    assert sum(quantized_weight(layer) is not None for layer in ALL.select(second)) == 21


def test_less_than_half_a_block_is_one_and_is_told(
    deep: Callable[..., Model], caplog: pytest.LogCaptureFixture
) -> None:
    model = deep("llama")
    report = Depth(0.05).compress(model, ALL.select(model), TEXT)
    assert model.network.config.num_hidden_layers == 4
    assert report.sparsity == pytest.approx(0.2)
    assert "sparsity=0.05 of 5 blocks is less than half of one; one is dropped" in caplog.text


@pytest.mark.parametrize(
    ("kind", "target", "sparsity", "said"),
    [
        ("llama", Target("att", ["decoder_self_att"]), 0.4, "choose target=all"),
        ("llama", ALL, 0.95, "without a block"),
        ("albert", ALL, 0.4, "one block for its whole depth"),
    ],
)
def test_what_cannot_be_dropped_is_one_line(
    kind: str, target: Target, sparsity: float, said: str, deep: Callable[..., Model]
) -> None:
    model = deep(kind)
    before = logits_of(model)
    with pytest.raises(BadInput, match=said):
        Depth(sparsity).compress(model, target.select(model), TEXT)
    assert torch.equal(before, logits_of(model))


def test_quantized_layers_are_refused(deep: Callable[..., Model]) -> None:
    model = deep()
    with pytest.raises(BadInput, match="must come first"):
        Pipeline([Gptq(bits=3), Depth(0.4)]).compress(model, ALL.select(model), TEXT)


def test_blocks_whose_kind_follows_from_their_number_are_refused(tiny_tokenizer: Any) -> None:
    """Llama 4's configuration has a list of the numbers of the blocks with experts."""
    model = Model(build_network("llama4_text"), tiny_tokenizer, "llama4")
    with pytest.raises(BadInput, match=r"could not be loaded by stock transformers"):
        Depth(0.5).compress(model, Target("all", [*ALL.roles, "shared_experts"]).select(model), TEXT)
