"""Folders that are damaged, or put together from two models: one line that says what, where and what is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import commands, gguf_files
from helpers import stored_layers as made_of
from helpers.every_type import write_tiny
from helpers.networks import build_network
from helpers.places import ROOT
from helpers.stored_folders import WEIGHTS, WIDE, Maker, describe, write_folder
from knowledge_compression.errors import BadInput
from knowledge_compression.models.loading import LocalModel

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def plain(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A saved tiny LLaMA."""
    build_network("llama", **WIDE).save_pretrained(tmp_path / "plain")
    tiny_tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def stored(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Path]:
    """``stored(maker, other)`` stores one layer as ``other`` makes it, and as floats if that is None."""

    def make(maker: Maker, *other: Maker | None) -> Path:
        write_folder(tmp_path / "stored", tiny_tokenizer, maker, apart={LAYER: other[0]} if other else {})
        return tmp_path / "stored"

    return make


def refused(place: Path, match: str) -> None:
    with pytest.raises(BadInput, match=match) as caught:
        LocalModel("local", str(place)).load("cpu", "float32")
    assert "\n" not in str(caught.value)


MIXED: dict[str, tuple[Maker, Maker, str]] = {
    "gptq with NF4": (made_of.gptq, made_of.four_bit, r"gptq, but it holds .*\.weight\.absmax, .* bitsandbytes 4 bits"),
    "gptq with int8": (made_of.gptq, made_of.eight_bit, r"gptq, but it holds .*\.SCB, .* format bitsandbytes 8 bits"),
    "gptq with fp8": (made_of.gptq, made_of.block_fp8, r"gptq, but it holds .*\.weight_scale_inv, .* the format fp8"),
    "gptq with packed": (made_of.gptq, made_of.packed, r"gptq, but it holds .*_scale, .* format compressed-tensors"),
    "fp8 with gptq": (made_of.block_fp8, made_of.gptq, r"fp8, but it holds .*\.qweight, .* the format gptq or awq"),
    "NF4 with awq": (made_of.four_bit, made_of.awq, r"4 bits, but it holds .*\.qweight, .* the format gptq or awq"),
    "awq with gptq": (
        made_of.awq,
        made_of.gptq,
        r"format awq, but the shapes of .*qweight .* those of the format gptq;",
    ),
    "gptq with awq": (
        made_of.gptq,
        made_of.awq,
        r"format gptq, but the shapes of .*qweight .* those of the format awq;",
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_layer_in_another_format_is_named(name: str, stored: Callable[..., Path]) -> None:
    maker, other, match = MIXED[name]
    refused(stored(maker, other), match)


@pytest.mark.parametrize(
    ("maker", "where", "named"),
    [
        (made_of.gptq, "dynamic", {"dynamic": {r"-:.*\.1\.mlp\.down_proj": {}}}),
        (made_of.awq, "modules_to_not_convert", {"modules_to_not_convert": [LAYER]}),
        (made_of.packed, "ignore", {"ignore": [r"re:.*\.1\.mlp\.down_proj$"]}),
        (made_of.four_bit, "llm_int8_skip_modules", {"llm_int8_skip_modules": ["down_proj"]}),
    ],
)
def test_a_layer_of_floats_among_coded_ones_must_be_named(
    maker: Maker, where: str, named: dict[str, Any], stored: Callable[..., Path]
) -> None:
    """Other programs look for its codes: a folder that does not name it is put together from two models."""
    folder = stored(maker, None)
    refused(folder, f"{LAYER} as plain floats, but the same layer of other blocks .* under {where}")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    describe(folder, quantization_config=settings | named)
    weight = LocalModel("local", str(folder)).load("cpu", "float32").network.state_dict()[f"{LAYER}.weight"]
    assert torch.equal(weight, load_file(folder / WEIGHTS)[f"{LAYER}.weight"].float())


def test_a_layer_may_be_named_as_in_the_network(tmp_path: Path) -> None:
    """Gemma 3's files hold ``language_model.model``, and its network ``model.language_model``, which settings use."""
    write_tiny("gemma3", tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    left = "language_model.model.layers.1.mlp.down_proj"
    for name in [name for name in state if name.endswith("down_proj.weight") and not name.startswith(left)]:
        made = made_of.eight_bit(np.random.default_rng(0), *state[name].shape)
        state |= {name.removesuffix(".weight") + end: tensor for end, tensor in made.tensors.items()}
    save_file(state, tmp_path / WEIGHTS, {"format": "pt"})
    skipped = [f"model.language_model.{left.removeprefix('language_model.model.')}"]
    describe(tmp_path, quantization_config=made.settings | {"llm_int8_skip_modules": skipped})
    weights = LocalModel("local", str(tmp_path)).load("cpu", "float32").network.state_dict()
    assert torch.equal(weights[f"{skipped[0]}.weight"], state[f"{left}.weight"])
    assert torch.equal(weights[f"{skipped[0]}.weight".replace(".1.", ".0.")], torch.from_numpy(made.weight))


def test_eight_bit_floats_without_their_scales_are_no_weights(stored: Callable[..., Path]) -> None:
    folder = stored(made_of.block_fp8)
    state = load_file(folder / WEIGHTS)
    del state[f"{LAYER}.weight_scale_inv"]
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    refused(folder, f"{LAYER}.weight in the type F8_E4M3, without the scales")


def test_codes_that_no_configuration_describes(stored: Callable[..., Path]) -> None:
    folder = stored(made_of.gptq)
    describe(folder, quantization_config=None)
    refused(folder, r"\.qweight, which is part of a layer in the format gptq or awq, but its config.json has no")


@pytest.mark.parametrize("settings", [{}, {"bits": 4}, {"quant_method": None}])
def test_a_declaration_without_a_method(settings: dict[str, Any], stored: Callable[..., Path]) -> None:
    folder = stored(made_of.gptq)
    describe(folder, quantization_config=settings)
    refused(folder, "its quantization_config names no quant_method; gptq, awq, .* and GGUF files can be read")


@pytest.mark.parametrize(("name", "by"), [("quanto_qmap.json", "optimum-quanto"), ("qmodel.pt", "a pickle .* hqq")])
def test_folders_that_programs_write_in_their_own_way(name: str, by: str, plain: Path) -> None:
    (plain / name).write_bytes(b"")
    (plain / WEIGHTS).unlink()
    refused(plain, f"it holds {name}, .*{by}, which cannot be read; gptq, awq, .* and GGUF files can be read")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_gguf_file_beside_other_weights_asks_which(
    compressed: bool, plain: Path, stored: Callable[..., Path]
) -> None:
    folder = stored(made_of.gptq) if compressed else plain
    gguf_files.write(folder / "other.gguf")
    choices = rf"model.path={folder}/config.json or model.path={folder}/other.gguf"
    refused(folder, f"it holds both model.safetensors and other.gguf; choose one by {choices}")
    chosen = LocalModel("local", str(folder / "config.json"))
    there = chosen.load("cpu", "float32")
    assert (there.on_disk.format if there.on_disk else None) == ("gptq" if compressed else None)
    assert chosen.label == f"{folder.parent.name}/{folder.name}"
    other = LocalModel("local", str(folder / "other.gguf")).load("cpu", "float32")
    assert other.on_disk is not None and other.on_disk.format == "gguf"
    (folder / WEIGHTS).unlink()  # many folders of GGUF files have a configuration beside them
    assert LocalModel("local", str(folder)).load("cpu", "float32").on_disk == other.on_disk


@pytest.mark.parametrize("end", [0, 4, 40, -1], ids=["empty", "length", "header", "data"])
def test_a_file_that_is_cut_short_is_named(end: int, plain: Path) -> None:
    content = (plain / WEIGHTS).read_bytes()
    (plain / WEIGHTS).write_bytes(content[:end])
    refused(plain, f"{plain / WEIGHTS} is damaged or cut short .*; copy the whole file again")


@pytest.mark.parametrize("what", ["cut", "lacks a tensor", "index"])
def test_a_part_that_is_damaged_is_named(what: str, plain: Path) -> None:
    (plain / WEIGHTS).unlink()
    build_network("llama", **WIDE).save_pretrained(plain, max_shard_size="40KB")
    part = sorted(plain.glob("model-*.safetensors"))[1]
    index = plain / "model.safetensors.index.json"
    if what == "cut":
        part.write_bytes(part.read_bytes()[:-1])
    elif what == "index":
        index.write_text('{"weight_map": ')
    else:
        save_file({"another": torch.zeros(1)}, part, {"format": "pt"})
    refused(plain, f"{index} cannot be read" if what == "index" else f"{part} is damaged or cut short")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"intermediate_size": 128}, r"\.weight of shape .*96.*, but its configuration describes .*128"),
        ({"vocab_size": 999}, r"\.weight of shape .*, but its configuration describes \[999, 64\]"),
        ({"num_hidden_layers": 1}, r"hold model\.layers\.1\..*, but its configuration has 1 blocks"),
        ({"num_hidden_layers": 3}, r"has 3 blocks, but its files hold no weight of the last \(model\.layers\.2\."),
    ],
)
def test_weights_of_another_size_than_the_configuration(changes: dict[str, int], match: str, plain: Path) -> None:
    describe(plain, **changes)
    refused(plain, match)


@pytest.mark.slow
def test_from_the_command_line(plain: Path, tmp_path: Path) -> None:
    """One line and exit status 2; nothing is written."""
    describe(plain, intermediate_size=128)
    outputs = tmp_path / "outputs"
    choices = ["model=local", f"model.path={plain}", "compression=none", f"output.dir={outputs}"]
    done = commands.run(str(ROOT / "run.py"), *choices, folder=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: model=local: ") and done.stderr.count("\n") == 1
    assert not list(outputs.glob("runs/*"))
