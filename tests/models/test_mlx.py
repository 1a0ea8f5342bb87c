"""Folders that mlx-lm made: its names, stacked experts, turned convolutions and raised norms, for each such type.

The conversions are written here a second time, from what mlx-lm 0.32 does; ``test_format_peers.py`` runs mlx-lm itself.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from helpers import stored_layers
from helpers.every_type import write_tiny
from helpers.places import DOCS
from helpers.stored_folders import WEIGHTS, describe
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model
from knowledge_compression.models.checkpoints.folder import is_compressed
from knowledge_compression.models.checkpoints.mlx import TYPES, Mlx
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.saving import save_checkpoint
from knowledge_compression.models.streamed import Described

State = dict[str, Tensor]
WIDE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "head_dim": 16}
AFFINE = {"group_size": 32, "bits": 4, "mode": "affine"}


def stacked(bank: str, projections: tuple[str, str, str] = ("gate_proj", "down_proj", "up_proj")) -> Callable:
    """Experts as one tensor for each projection."""

    def convert(state: State) -> State:
        kept = {name: tensor for name, tensor in state.items() if ".experts." not in name}
        places = {name.partition(".experts.")[0] for name in state if ".experts." in name}
        for place in sorted(places):
            for theirs, ours in zip(projections, ("gate_proj", "down_proj", "up_proj"), strict=True):
                of = [state[f"{place}.experts.{expert}.{theirs}.weight"] for expert in range(4)]
                kept[f"{place}.{bank}.{ours}.weight"] = torch.stack(of)
        return kept

    return convert


def turned(state: State) -> State:
    """Convolutions as MLX wants them."""
    return {name: w.movedim(2, 1) if re.search("conv(1d)?.weight", name) else w for name, w in state.items()}


def raised(state: State) -> State:
    """Norms that add 1 to their weights, with it added."""
    norms = ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")
    return {name: w + 1 if name.endswith(norms) else w for name, w in state.items()}


def text_part(state: State) -> State:
    """The text part of a network with parts for pictures."""
    text = {name: w for name, w in state.items() if "language_model" in name or name.startswith("lm_head")}
    plain = {name.removeprefix("language_model."): w for name, w in text.items()}
    named = {name.replace("model.language_model", "model"): w for name, w in plain.items()}
    return {f"language_model.{name}": w for name, w in named.items()}


CONVERSIONS: dict[str, list[Callable[[State], State]]] = {
    "olmoe": [stacked("switch_mlp")],
    "dots1": [stacked("experts")],
    "mixtral": [stacked("switch_mlp", ("w1", "w2", "w3"))],
    "mamba": [turned],
    "lfm2": [turned],
    "jamba": [stacked("switch_mlp"), turned],
    "qwen3_next": [stacked("switch_mlp"), turned, raised],
    "qwen3_5": [text_part, turned, raised],
    "gemma3": [text_part],
    "gemma4": [text_part],
}


def folder_of(model_type: str, folder: Path) -> tuple[Path, Path]:
    """A tiny network as its publisher saves it, and its floats as mlx-lm converts them."""
    wrapped = text_part in CONVERSIONS.get(model_type, [])
    write_tiny(
        model_type, folder / "theirs", AutoModelForImageTextToText if wrapped else None, **({} if wrapped else WIDE)
    )
    shutil.copytree(folder / "theirs", folder / "mlx")
    state = load_file(folder / "theirs" / WEIGHTS)
    for convert in CONVERSIONS.get(model_type, []):
        state = convert(state)
    save_file({name: w.contiguous() for name, w in state.items()}, folder / "mlx" / WEIGHTS, {"format": "mlx"})
    return folder / "theirs", folder / "mlx"


def load(folder: Path) -> Model:
    return LocalModel("local", str(folder)).load("cpu", "float32")


def logits(model: Model) -> Tensor:
    with torch.inference_mode():
        return model.network(input_ids=torch.arange(4, 20)[None]).logits


def coded(folder: Path, *weights: str, bits: int = 4) -> dict[str, np.ndarray]:
    """Put random codes in place of weights; returns what they stand for."""
    state, rng, told = load_file(folder / WEIGHTS), np.random.default_rng(0), {}
    for name in weights:
        shape = state.pop(name).shape
        made = [stored_layers.mlx(rng, *shape[-2:], bits=bits) for _ in range(shape[0] if len(shape) == 3 else 1)]
        for end in (".weight", ".scales", ".biases"):
            parts = [one.tensors[end].view(torch.int32 if end == ".weight" else torch.float16) for one in made]
            whole = torch.stack(parts) if len(shape) == 3 else parts[0]
            state[name.removesuffix(".weight") + end] = whole.view(torch.uint32) if end == ".weight" else whole
        told[name] = np.stack([one.weight for one in made]) if len(shape) == 3 else made[0].weight
    save_file(state, folder / WEIGHTS, {"format": "mlx"})
    return told


@pytest.mark.parametrize("model_type", CONVERSIONS)
def test_a_converted_network_answers_as_the_published_one(model_type: str, tmp_path: Path) -> None:
    theirs, ours = folder_of(model_type, tmp_path)
    # 1 + w and then less 1 is rounded.
    assert torch.allclose(logits(load(ours)), logits(load(theirs)), atol=1e-5 if TYPES[model_type].raised else 0)


def test_a_bank_of_coded_experts(tmp_path: Path) -> None:
    _, folder = folder_of("mixtral", tmp_path)
    place = "model.layers.1.block_sparse_moe.switch_mlp"
    told = coded(folder, *(f"{place}.{one}_proj.weight" for one in ("gate", "up", "down")))
    describe(folder, quantization=AFFINE)
    experts = load(folder).network.model.layers[1].mlp.experts
    gate_up = np.concatenate([told[f"{place}.gate_proj.weight"], told[f"{place}.up_proj.weight"]], 1)
    assert np.array_equal(experts.gate_up_proj.detach().numpy(), gate_up)
    assert np.array_equal(experts.down_proj.detach().numpy(), told[f"{place}.down_proj.weight"])


@pytest.mark.parametrize("both", [False, True], ids=["older", "newer"])
def test_settings_stand_in_quantization(both: bool, tmp_path: Path) -> None:
    """Newer versions write them a second time, as ``quantization_config`` without a ``quant_method``."""
    _, folder = folder_of("llama", tmp_path)
    layer = "model.layers.1.mlp.up_proj.weight"
    told = coded(folder, layer, "model.embed_tokens.weight")
    describe(folder, quantization=AFFINE, **({"quantization_config": AFFINE} if both else {}))
    assert is_compressed(json.loads((folder / "config.json").read_text()))
    model = load(folder)
    state = model.network.state_dict()
    assert all(np.array_equal(state[name].numpy(), weight) for name, weight in told.items())
    assert model.on_disk is not None and (model.on_disk.format, model.on_disk.group) == ("mlx", 32)
    save_checkpoint(model, tmp_path / "dense")
    assert "quantization" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "dense")), logits(model))


def test_a_layer_with_settings_of_its_own(tmp_path: Path) -> None:
    """They are affine unless they say otherwise, whatever the mode of the others; false leaves a layer as floats."""
    _, folder = folder_of("llama", tmp_path)
    layer = "model.layers.0.self_attn.q_proj"
    told = coded(folder, f"{layer}.weight", bits=8)
    apart = {layer: {"group_size": 32, "bits": 8}, "lm_head": False}
    describe(folder, quantization={"group_size": 32, "bits": 4, "mode": "mxfp4"} | apart)
    assert np.array_equal(load(folder).network.state_dict()[f"{layer}.weight"].numpy(), told[f"{layer}.weight"])


def test_the_page_names_every_type_that_is_read() -> None:
    page = (DOCS / "formats.md").read_text()
    paragraph = page[page.index("runs mlx-lm itself:") : page.index("Their weights are those of the file")]
    assert set(re.findall("`([a-z0-9_]+)`", paragraph)) == TYPES.keys()


def test_rounded_inputs_are_noted() -> None:
    settings = {"model_type": "llama", "group_size": 16, "bits": 4, "mode": "nvfp4", "quantize_input": True}
    assert "rounded inputs" in Mlx.of(settings).notes[0]


def test_floats_of_a_type_that_stays_as_it_is_are_left_to_transformers(tmp_path: Path) -> None:
    theirs, folder = folder_of("llama", tmp_path)
    model = load(folder)
    assert model.on_disk is None and torch.equal(logits(model), logits(load(theirs)))


def test_codes_in_a_folder_of_floats_are_one_line() -> None:
    part = {".scales": Described((4, 1), "F16")} | dict.fromkeys((".weight", ".biases"), Described((4, 4), "U32"))
    with pytest.raises(BadInput, match="has no settings for that layer's codes"):
        Mlx.of({"model_type": "mamba"}).coded("layer", part, {})


BAD = {
    "type": ({}, {"model_type": "falcon_h1", "quantization": AFFINE}, "type 'falcon_h1'; cohere"),
    "mode": ({}, {"quantization": {**AFFINE, "mode": "int4"}}, "has mode='int4'; MLX has affine, mxfp4, mxfp8, nvfp4"),
    "bits": ({}, {"quantization": {**AFFINE, "bits": 9}}, "group_size=32 and bits=9, which affine of MLX cannot have"),
    "group": (
        {},
        {"quantization": {"mode": "mxfp4", "group_size": 64, "bits": 4}},
        "group_size=64 and bits=4, which mxfp4",
    ),
    "number": ({}, {"quantization": {**AFFINE, "bits": "4"}}, "bits='4', which must be a whole number"),
    "biases": ({".biases": None}, {}, "but not model.layers.1.mlp.up_proj.biases"),
    "words": ({".weight": torch.zeros(96, 9, dtype=torch.uint32)}, {}, "but its other tensors require [96, 8]"),
    "codes": ({".weight": torch.zeros(96, 8)}, {}, "up_proj.weight is F32 [96, 8]; MLX packs codes into words (U32)"),
    "others": (
        {},
        {"quantization": {"quant_algo": "FP8"}},
        "of shape [96, 8], but its configuration describes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_line(name: str, tmp_path: Path) -> None:
    tensors, config, said = BAD[name]
    _, folder = folder_of("llama", tmp_path)
    layer = "model.layers.1.mlp.up_proj"
    coded(folder, f"{layer}.weight")
    state = load_file(folder / WEIGHTS)
    for end, tensor in tensors.items():
        state.pop(layer + end)
        state |= {} if tensor is None else {layer + end: tensor}
    save_file(state, folder / WEIGHTS, {"format": "mlx"})
    describe(folder, **({"quantization": AFFINE} | config))
    with pytest.raises(BadInput, match=re.escape(said)) as raised_:
        load(folder)
    assert "\n" not in str(raised_.value)
