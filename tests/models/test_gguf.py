"""GGUF files: every type and architecture, beside what transformers itself makes of them; damaged and strange ones."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from transformers import AutoTokenizer

from helpers import gguf_files
from helpers.gguf_files import ARCHITECTURES
from helpers.gguf_tiny import tiny
from knowledge_compression.compression.formats.gguf import save_gguf
from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.gguf.file import GgufFile
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.pretrained import auto_class

Kind = GGMLQuantizationType
ROW = 256  # a row that every type can store


def decodable() -> list[Kind]:
    """Every type of the installed gguf that it decodes."""
    rng, found = np.random.default_rng(0), []
    for kind in Kind:
        try:
            dequantize(gguf_files.random_blocks(rng, kind, (1, ROW)), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


@pytest.mark.parametrize("kind", decodable(), ids=lambda kind: kind.name)
def test_every_type_that_gguf_decodes(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_files.write(path, "llama", kind, settings={"hidden_size": ROW, "intermediate_size": ROW, "head_dim": 64})
    model = LocalModel("local", str(path)).load("cpu", "float32")
    from gguf import GGUFReader

    there = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    stored = there["blk.1.ffn_gate.weight"]
    assert stored.tensor_type == kind
    wanted = dequantize(stored.data, kind)
    weight = model.network.state_dict()["model.layers.1.mlp.gate_proj.weight"]
    assert np.array_equal(weight.numpy(), wanted, equal_nan=True)
    told = model.on_disk
    assert told is not None and kind.name in told.weights
    assert sum(told.weights.values()) == sum(int(tensor.n_elements) for tensor in there.values())
    assert told.bytes == path.stat().st_size and told.made_by == "gguf-py"


@pytest.mark.parametrize(
    ("architecture", "scaled", "parameter"),
    [
        ("llama", "blk.1.attn_output", "model.layers.1.self_attn.o_proj.weight"),
        ("qwen3moe", "blk.1.ffn_down_exps", "model.layers.1.mlp.experts.down_proj"),
        ("t5", "dec.blk.1.ffn_up", "decoder.block.1.layer.2.DenseReluDense.wi_1.weight"),
    ],
)
def test_a_tensor_may_be_scaled_by_another(architecture: str, scaled: str, parameter: str, tmp_path: Path) -> None:
    """As llama.cpp stores NVFP4 and ternary weights: a number for each matrix, for a bank one for each expert."""
    gguf_files.write(tmp_path / "plain.gguf", architecture)
    plain = LocalModel("local", str(tmp_path / "plain.gguf")).load("cpu", "float32").network.state_dict()
    each = np.array([0.5, 3] if "exps" in scaled else [0.5], np.float32)
    gguf_files.write(tmp_path / "scaled.gguf", architecture, further={f"{scaled}.scale": each})
    there = LocalModel("local", str(tmp_path / "scaled.gguf")).load("cpu", "float32").network.state_dict()
    factors = torch.from_numpy(each).reshape(-1, *[1] * (plain[parameter].dim() - 1))
    assert torch.equal(there.pop(parameter), plain[parameter] * factors)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in there.items())


def test_a_wrong_number_of_scales_is_one_line(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "model.gguf", further={"blk.1.attn_q.scale": np.ones(3, np.float32)})
    with pytest.raises(BadInput, match=r"blk\.1\.attn_q\.scale has 3 numbers") as caught:
        LocalModel("local", str(tmp_path / "model.gguf")).load("cpu", "float32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_as_transformers_reads_it(architecture: str, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "model.gguf", architecture, Kind.Q8_0)
    ours = LocalModel("local", str(tmp_path / "model.gguf")).load("cpu", "float32")
    kind = auto_class(ours.network.config)
    theirs = kind.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    mine, other = ours.network.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("abc dead beef", "zebra", ""):
        assert ours.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert ours.tokenizer.chat_template is None and tokenizer.chat_template == gguf_files.TEMPLATE


@pytest.mark.parametrize("tied", [True, False])
def test_a_split_file_is_one_model_whichever_part_is_named(tied: bool, tmp_path: Path) -> None:
    settings = {"tie_word_embeddings": tied}
    gguf_files.write(tmp_path / "whole.gguf", "llama", Kind.Q4_0, settings=settings)
    (tmp_path / "split").mkdir()
    gguf_files.write(tmp_path / "split" / "model.gguf", "llama", Kind.Q4_0, settings=settings, parts=5)
    parts = sorted((tmp_path / "split").iterdir())
    assert len(parts) > 2
    whole = LocalModel("local", str(tmp_path / "whole.gguf")).load("cpu", "float32").network
    named = [LocalModel("local", str(place)) for place in (tmp_path / "split", parts[0], parts[2])]
    for source in named:
        network = source.load("cpu", "float32").network
        assert network.config.tie_word_embeddings is tied
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), whole.parameters(), strict=True))
    assert len({source.fingerprint() for source in named}) == 1
    parts[1].unlink()
    with pytest.raises(BadInput, match=f"lacks {parts[1].name}, one of the {len(parts)} parts"):
        named[1].skeleton()


def test_a_folder_of_several_files_is_asked_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        gguf_files.write(tmp_path / name)
    with pytest.raises(BadInput, match=r"holds several GGUF files \(a.gguf, b.gguf\); choose one, e.g. model.path="):
        LocalModel("local", str(tmp_path)).skeleton()


def test_blocks_that_predict_further_tokens_are_no_blocks_of_the_network(tmp_path: Path) -> None:
    """llama.cpp's conversions count them; run as the last blocks, they would change every answer."""
    network = tiny("exaone-moe").network
    save_gguf(tiny("exaone-moe"), tmp_path / "saved")
    (path,) = (tmp_path / "saved").glob("*.gguf")
    content, key = bytearray(path.read_bytes()), b"exaone-moe.nextn_predict_layers"
    struct.pack_into("<I", content, content.index(key) + len(key) + 4, 1)  # behind the number of the value's type
    path.write_bytes(content)
    found = LocalModel("local", str(path)).load("cpu", "float32").network
    assert found.config.num_hidden_layers == network.config.num_hidden_layers - 1
    assert found.config.layer_types == network.config.layer_types[:-1]
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in found.state_dict().items())


@pytest.fixture
def good(tmp_path: Path) -> Path:
    gguf_files.write(tmp_path / "model.gguf", "llama", Kind.Q4_0)
    return tmp_path / "model.gguf"


def refused(path: Path, match: str) -> None:
    for ask in (LocalModel("local", str(path)).skeleton, LocalModel("local", str(path)).load):
        with pytest.raises(BadInput, match=match) as caught:
            ask()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_one_line(share: float, good: Path) -> None:
    content = good.read_bytes()
    good.write_bytes(content[: max(4, int(share * len(content)))])
    refused(good, "it is truncated")


def test_false_lengths_are_not_believed(good: Path) -> None:
    content = good.read_bytes()
    place = content.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    good.write_bytes(content[:place] + struct.pack("<Q", 1 << 60) + content[place + 8 :])
    refused(good, "it is truncated")


def test_another_version_is_one_line(good: Path) -> None:
    good.write_bytes(good.read_bytes().replace(b"GGUF\x03", b"GGUF\x09", 1))
    refused(good, "of version 9; versions 2 and 3 can be read")


def test_a_type_that_gguf_does_not_know_is_one_line(good: Path) -> None:
    content = good.read_bytes()
    name = b"blk.1.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 16
    good.write_bytes(content[:place] + struct.pack("<I", 999) + content[place + 4 :])
    refused(good, r"blk\.1\.attn_q\.weight is stored in the type 999, which the installed gguf does not know")


def test_an_unknown_architecture_is_told_which_are_read(good: Path) -> None:
    good.write_bytes(good.read_bytes().replace(b"llama", b"llbma"))
    refused(good, "of the architecture llbma; those that can be read are afmoe, .*llama")


def test_a_file_that_is_no_gguf_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04 something else")
    refused(tmp_path / "model.bin", "is a file but not a GGUF file")


def test_any_changed_byte_is_answered_in_one_line_or_read(good: Path) -> None:
    """No byte of the header, changed, makes a stack trace of another kind or hangs."""
    content, rng = good.read_bytes(), np.random.default_rng(0)
    header = content.index(b"blk.1.attn_norm") + 200
    for _ in range(150):
        place = int(rng.integers(4, header))
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        good.write_bytes(bytes(changed))
        try:
            found = GgufFile.at(good)
            assert found is not None
            assert found.record().bytes == len(content)
        except BadInput as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (
            {"type": "yarn", "factor": 8.0, "original_context_length": 32, "yarn_attn_factor": 1.2079441541679836},
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        ),
        ({"type": "none"}, {"rope_type": "default"}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
    ],
)
def test_scaled_rotary_embeddings_are_read(settings: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "model.gguf", further={f"llama.rope.scaling.{k}": v for k, v in settings.items()})
    told = LocalModel("local", str(tmp_path / "model.gguf")).load("cpu", "float32").network.config.rope_parameters
    assert {name: told[name] for name in wanted} == wanted and told["rope_theta"] == 10_000


@pytest.mark.parametrize(
    ("further", "match"),
    [
        ({"llama.rope.scaling.type": "longrope"}, r"scaled by type \(longrope\), which cannot be read"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1},
            r"scaled by type, yarn_log_multiplier \(yarn\)",
        ),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 8.0}
            | {"llama.rope.scaling.yarn_attn_factor": 1.0},
            r"scaled by factor, type, yarn_attn_factor \(yarn\)",
        ),
        ({"rope_freqs.weight": np.full(8, 3, np.float32)}, "rope_freqs.weight scale rotary embeddings differently"),
        ({"rope_factors_long.weight": np.ones(8, np.float32)}, "that depend on the length of the text cannot be read"),
    ],
)
def test_other_scalings_are_one_line(further: dict[str, Any], match: str, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "model.gguf", further=further)
    refused(tmp_path / "model.gguf", match)
