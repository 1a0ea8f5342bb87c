"""Packed GPTQ checkpoints, field by field, against an unpacker that shares nothing with the packer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from helpers.networks import VOCABULARY, build_network
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.pipeline import Pipeline
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.writing.gptq import GptqWriter
from knowledge_compression.compression.writing.words import packed
from knowledge_compression.compression.writing.writers import check_form
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.targets import linear_layers

ALL = Target("all", ["encoder_att", "decoder_self_att", "cross_att", "ff"])


def unpack(words: torch.Tensor, bits: int) -> np.ndarray:
    """Codes ``[count, columns]``: the bits of each column's words, lowest first, taken ``bits`` at a time."""
    columns = np.ascontiguousarray(words.numpy().T).astype("<i4").view(np.uint8)
    stream = np.unpackbits(columns, axis=1, bitorder="little").reshape(len(columns), -1, bits)
    return (stream * (1 << np.arange(bits))).sum(-1).T


@given(bits=st.sampled_from([2, 3, 4, 8]), runs=st.integers(1, 3), columns=st.integers(1, 5), seed=st.integers(0, 99))
def test_packing_is_a_stream_of_bits(bits: int, runs: int, columns: int, seed: int) -> None:
    codes = torch.randint(2**bits, (32 * runs, columns), generator=torch.Generator().manual_seed(seed))
    words = packed(codes.to(torch.uint8), bits)
    assert words.dtype == torch.int32 and words.shape == (runs * bits, columns)
    assert np.array_equal(unpack(words, bits), codes.numpy())


def test_three_bits_lie_as_in_published_checkpoints() -> None:
    """Ten codes in the first word, the eleventh across its end: two bits there, one in the next."""
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[10], codes[21] = 0b101, 0b011
    first, second, third = (int(word) & 0xFFFFFFFF for word in packed(codes, 3)[:, 0])
    assert (first, second, third) == (0b01 << 30, 1 | 1 << 31, 0b01)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize(
    "method",
    [
        Gptq(bits=4, group_size=16, symmetric=True),
        Gptq(bits=3),
        Gptq(bits=2, group_size=32, static_groups=False),
        Rtn(bits=8, symmetric=True, scale_bits=16),
    ],
    ids=["gptq4-g16-sym", "gptq3", "gptq2-g32-act-order", "rtn8-sym"],
)
def test_a_packed_checkpoint_holds_the_weights(
    method: Gptq | Rtn, architecture: str, tiny_tokenizer: object, tmp_path: Path
) -> None:
    wide = {
        "llama": {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32},
        "opt": {"hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64},
        "gpt2": {"n_embd": 64},
    }
    model = Model(build_network(architecture, **wide[architecture]), tiny_tokenizer, architecture)  # type: ignore[arg-type]
    windows = torch.randint(7, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))
    targets = ALL.select(model)
    method.compress(model, targets, windows)  # type: ignore[arg-type]
    weights = {layer.path: layer.weight.clone() for layer in targets}
    biases = {layer.path: layer.bias for layer in targets}
    GptqWriter().write(model, tmp_path / "packed")

    state = load_file(tmp_path / "packed" / "model.safetensors")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "packed" / "quantize_config.json").read_text())
    assert (config["quant_method"], config["bits"], config["sym"]) == ("gptq", method.bits, method.symmetric)
    assert config["group_size"] == (method.group_size or -1)
    assert config["checkpoint_format"] == ("gptq" if method.symmetric else "gptq_v2")
    assert not config["lm_head"] and "dynamic" not in config
    offset = 1 if config["checkpoint_format"] == "gptq" else 0
    for path, weight in weights.items():
        out, inputs = weight.shape
        codes = unpack(state[f"{path}.qweight"], method.bits)
        zeros = unpack(state[f"{path}.qzeros"].T.contiguous(), method.bits).T + offset
        scales, groups = state[f"{path}.scales"], state[f"{path}.g_idx"]
        assert scales.dtype == torch.float16 and groups.dtype == torch.int32
        assert codes.shape == (inputs, out) and zeros.shape == scales.shape == (int(groups.max()) + 1, out)
        g = groups.numpy()
        read = scales.float().numpy()[g] * (codes.astype(np.float32) - zeros.astype(np.float32)[g])
        assert np.array_equal(read.T, weight.numpy()), path
        assert f"{path}.weight" not in state
        if biases[path] is not None:
            assert torch.equal(state[f"{path}.bias"], biases[path])
    before, kept = model.network.state_dict(), state.keys() & model.network.state_dict().keys()
    assert kept and all(torch.equal(state[name], before[name]) for name in kept)
    if not getattr(method, "static_groups", True):
        assert config["desc_act"]

    back = LocalModel("local", str(tmp_path / "packed")).load("cpu", "float32")
    for layer in ALL.select(back):
        assert torch.equal(layer.weight, weights[layer.path]), layer.path
    told = back.on_disk
    assert told is not None and (told.format, told.bits) == ("gptq", method.bits)
    assert told.made_by == "knowledge_compression"


def test_layers_left_alone_are_named(tiny_tokenizer: object, tmp_path: Path) -> None:
    network = build_network("llama", hidden_size=64, intermediate_size=96, head_dim=32)
    model = Model(network, tiny_tokenizer, "llama")  # type: ignore[arg-type]
    Rtn(symmetric=True, scale_bits=16).compress(model, Target("att", ["decoder_self_att"]).select(model), None)
    GptqWriter().write(model, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "quantize_config.json").read_text())
    assert r"-:^model\.layers\.1\.mlp\.up_proj$" in config["dynamic"]
    assert len(config["dynamic"]) == 6


def test_a_layer_of_one_group_goes_with_layers_of_many(tiny_tokenizer: object, tmp_path: Path) -> None:
    network = build_network("llama", hidden_size=64, intermediate_size=128, head_dim=32)
    model = Model(network, tiny_tokenizer, "llama")  # type: ignore[arg-type]
    Rtn(symmetric=True, group_size=64, scale_bits=16).compress(model, ALL.select(model), None)
    GptqWriter().write(model, tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "quantize_config.json").read_text())["group_size"] == 64
    read = LocalModel("read", str(tmp_path / "packed")).load("cpu", "float32")
    for layer, again in zip(ALL.select(model), ALL.select(read), strict=True):
        assert torch.equal(layer.weight, again.weight)


def test_what_cannot_be_packed_is_one_line(tiny_model: Callable[[str], Model], tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(BadInput, match="no layer with codes"):
        GptqWriter().write(model, tmp_path / "packed")
    targets = ALL.select(model)
    Rtn(bits=4).compress(model, targets, None)
    with pytest.raises(BadInput, match=r"scales of 16 bits; choose compression\.scale_bits=16"):
        GptqWriter().write(model, tmp_path / "packed")
    Rtn(bits=3, scale_bits=16).compress(model, targets, None)
    with pytest.raises(BadInput, match=r"16 (in|out)puts of .* do not fill whole words of 32 bits with 3 bits"):
        GptqWriter().write(model, tmp_path / "packed")
    Rtn(bits=8, scale_bits=16).compress(model, targets, None)
    half = [layer for layer in linear_layers(model) if layer.role == "ff"]
    Rtn(bits=4, scale_bits=16).compress(model, type(targets)(half, model), None)
    with pytest.raises(BadInput, match=r"one number of bits for all layers, and they have \[4, 8\]"):
        GptqWriter().write(model, tmp_path / "packed")
    Rtn(bits=4, group_size=10, scale_bits=16).compress(model, targets, None)
    with pytest.raises(BadInput, match=r"group_size=10 does not divide the 16 inputs of model\.layers\.0"):
        GptqWriter().write(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_form_that_does_not_fit_is_refused_before_anything_is_computed(tiny_model: Callable[[str], Model]) -> None:
    targets = ALL.select(tiny_model("llama"))
    with pytest.raises(BadInput, match=r"output.save_model=gtpq does not exist \(did you mean gptq\?\); choose one of"):
        check_form("gtpq", Rtn(), targets)
    with pytest.raises(BadInput, match=r"compression=magnitude leaves floating-point numbers.*; choose true"):
        check_form("gptq", Magnitude(sparsity=0.5), targets)
    with pytest.raises(BadInput, match=r"scales of 16 bits; choose compression\.scale_bits=16"):
        check_form("gptq", Pipeline([Magnitude(sparsity=0.5), Rtn()]), targets)
    check_form("gptq", Pipeline([Magnitude(sparsity=0.5), Rtn(scale_bits=16)]), targets)
    check_form(True, Magnitude(sparsity=0.5), targets)
