"""Compressed checkpoints of every format, against decoders in numpy that share nothing with the product."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from transformers import PreTrainedTokenizerFast

from helpers import stored_layers as made_of
from helpers.hqq_layers import hqq
from helpers.stored_folders import Maker, describe, write_folder
from helpers.stored_layers import Made
from knowledge_compression.errors import BadInput, ModelUnavailable
from knowledge_compression.models.checkpoints.folder import FORMATS
from knowledge_compression.models.loading import LocalModel

MODEL_OPTIMIZER = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "W8A8_SQ_PER_CHANNEL", "MXFP8", "MXFP4", "NVFP4")
MODEL_OPTIMIZER += ("W4A16_AWQ",)
LAYERS: dict[str, Maker] = {
    **{f"gptq-v{v}-{b}": partial(made_of.gptq, bits=b, version=v) for v in (1, 2) for b in (2, 3, 4, 8)},
    "gptq-act-order": partial(made_of.gptq, act_order=True),
    "gptq-3-bits-act-order": partial(made_of.gptq, bits=3, act_order=True, version=2),
    "gptq-no-g-idx": partial(made_of.gptq, with_groups=False),
    "gptq-2-no-g-idx": partial(made_of.gptq, version=2, with_groups=False),
    "awq": made_of.awq,
    **{f"ct-packed-{b}": partial(made_of.packed, bits=b) for b in (2, 3, 4, 5, 6, 8)},
    "ct-packed-asymmetric": partial(made_of.packed, symmetric=False),
    "ct-packed-3-asymmetric": partial(made_of.packed, bits=3, symmetric=False),
    "ct-packed-ordered": partial(made_of.packed, order=True, symmetric=False),
    "ct-packed-3-whole-codes": partial(made_of.packed, bits=3, whole=True),
    **{f"ct-int-{s}": partial(made_of.plain, strategy=s) for s in ("tensor", "channel", "group", "block")},
    **{f"ct-float-{s}": partial(made_of.plain, kind="float", strategy=s) for s in ("tensor", "channel", "block")},
    "ct-int-zero": partial(made_of.plain, zero=True),
    "ct-nvfp4": made_of.nvfp4,
    "ct-mxfp4": made_of.mxfp4_packed,
    "ct-mxfp8": made_of.mxfp8,
    **{f"mlx-{bits}": partial(made_of.mlx, bits=bits) for bits in (1, 2, 3, 4, 5, 6, 8)},
    **{f"mlx-{m}": partial(made_of.mlx, mode=m, bits=int(m[-1])) for m in ("mxfp4", "mxfp8", "nvfp4")},
    **{f"modelopt-{one}": partial(made_of.modelopt, algorithm=one) for one in MODEL_OPTIMIZER},
    "sparse-24": made_of.sparse,
    "sparse-24-fp8": partial(made_of.sparse, fp8=True),
    "sparse-any": partial(made_of.sparse, two_of_four=False),
    **{f"bnb-{k}": partial(made_of.four_bit, kind=k) for k in ("nf4", "fp4")},
    "bnb-nf4-nested": partial(made_of.four_bit, nested=True),
    "bnb-nf4-as-floats": partial(made_of.four_bit, storage=torch.bfloat16),
    "bnb-int8": made_of.eight_bit,
    "fp8": made_of.block_fp8,
    **{f"torchao-{kind}": partial(made_of.torchao, kind=kind) for kind in ("int8", "float8", "int4")},
    **{f"torchao-{kind}-groups": partial(made_of.torchao, kind=kind, group=16) for kind in ("int8", "float8", "int4")},
    "torchao-tensor": partial(made_of.torchao, kind="float8", group=-1),
    **{f"hqq-{bits}-axis-{axis}": partial(hqq, bits=bits, axis=axis) for bits in (8, 4, 3, 2, 1) for axis in (0, 1)},
    **{f"hqq-{bits}": partial(hqq, bits=bits) for bits in (6, 1.58)},
    "hqq-whole": partial(hqq, channel_wise=False),
    "hqq-as-floats": partial(hqq, as_floats=True),
    "hqq-together": partial(hqq, axis=0, together=True),
}
PACKED_EVENLY = {"gptq", "awq", "mlx"}  # formats whose outputs and inputs fill whole words
# W4A16_AWQ has two outputs a byte, and MXFP4 blocks of 32;
# 48 codes of 3 bits fill five words either way, and are read as they are packed today.
NOT_ODD = {"ct-mxfp4", "ct-packed-3-whole-codes", "modelopt-W4A16_AWQ"}


LAST = "model.layers.1.mlp.down_proj"


def format_of(made: Made) -> Any:
    settings = made.settings
    method = settings["quant_method"]
    if method == "bitsandbytes":
        method += "_8bit" if settings.get("load_in_8bit") else "_4bit"
    return next(one for one in FORMATS if method in one.methods).of(settings)


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (96, 160)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_reads_as_the_floats_that_it_stands_for(name: str, shape: tuple[int, int]) -> None:
    made = LAYERS[name](np.random.default_rng(0), *shape)
    form = format_of(made)
    weight = form.decode("layer", {end: made.tensors[end] for end in form.endings if end in made.tensors})
    assert weight.dtype == torch.float32 and weight.shape == made.weight.shape
    assert np.array_equal(weight.numpy(), made.weight)


@pytest.mark.parametrize("shape", [(7, 48), (5, 16), (13, 208)], ids=str)
@pytest.mark.parametrize("name", [n for n in LAYERS if n.partition("-")[0] not in PACKED_EVENLY and n not in NOT_ODD])
def test_odd_shapes(name: str, shape: tuple[int, int]) -> None:
    maker = LAYERS[name]
    made = maker(np.random.default_rng(1), *shape, **({"group": 16} if "packed" in name else {}))
    assert np.array_equal(decoded_as_from_a_file(made).numpy(), made.weight)


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_that_fill_a_single_word(act_order: bool) -> None:
    made = made_of.gptq(np.random.default_rng(1), 32, 8, group=4, act_order=act_order)
    assert np.array_equal(decoded_as_from_a_file(made).numpy(), made.weight)


def decoded_as_from_a_file(made: Made) -> torch.Tensor:
    """The floats of a layer whose tensors have the strides of tensors that were read."""
    form = format_of(made)
    there = {end: made.tensors[end] for end in form.endings if end in made.tensors}
    return form.decode("layer", load(save({end: tensor.contiguous() for end, tensor in there.items()})))


def test_a_bank_of_experts() -> None:
    made = made_of.experts(np.random.default_rng(0), 3, 10, 64)
    weight = format_of(made).decode("bank", made.tensors)
    assert np.array_equal(weight.numpy(), made.weight)


@pytest.fixture
def stored(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., tuple[Path, dict[str, Made]]]:
    """``stored(maker)`` makes a folder of a small LLaMA whose block linears are stored so, and gives what it made."""

    def make(maker: Maker, architecture: str = "llama", **wide: Any) -> tuple[Path, dict[str, Made]]:
        folder = tmp_path / "stored"
        return folder, write_folder(folder, tiny_tokenizer, maker, architecture, **wide)

    return make


def write_settings(folder: Path, settings: Any) -> None:
    describe(folder, quantization_config=settings)


WHOLE = ["gptq-v1-4", "gptq-act-order", "awq", "ct-packed-asymmetric", "ct-float-channel", "ct-nvfp4", "ct-mxfp4"]
WHOLE += [
    "bnb-nf4-nested",
    "bnb-nf4-as-floats",
    "bnb-int8",
    "fp8",
    "sparse-24",
    "sparse-24-fp8",
    "sparse-any",
    "hqq-3-axis-0",
    "hqq-1.58",
    "mlx-3",
    "mlx-nvfp4",
    "modelopt-NVFP4",
    "modelopt-W4A16_AWQ",
]


@pytest.mark.parametrize("name", WHOLE)
def test_a_folder_loads_as_the_model_that_it_stands_for(
    name: str, stored: Callable[..., tuple[Path, dict[str, Made]]]
) -> None:
    folder, layers = stored(LAYERS[name])
    model = LocalModel("local", str(folder)).load("cpu", "float32")
    state = model.network.state_dict()
    assert len(layers) == 14
    for path, made in layers.items():
        assert np.array_equal(state[f"{path}.weight"].numpy(), made.weight), path
    plain = load_file(folder / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(state[norm], plain[norm].float())
    told, one = model.on_disk, next(iter(layers.values()))
    assert told is not None and told.bits == pytest.approx(one.bits)
    assert told.bytes == (folder / "model.safetensors").stat().st_size
    held = sum(
        t.numel() * t.element_size() for m in layers.values() for e, t in m.tensors.items() if e != ".weight_format"
    )
    weights = sum(made.weight.size for made in layers.values())
    assert told.layer_bits == pytest.approx(8 * held / weights)
    assert sum(told.weights.values()) == model.parameter_count()


def test_a_transposed_layer_is_turned(stored: Callable[..., tuple[Path, dict[str, Made]]]) -> None:
    folder, layers = stored(LAYERS["gptq-v2-4"], "gpt2", n_embd=64)
    state = LocalModel("local", str(folder)).load("cpu", "float32").network.state_dict()
    for path, made in layers.items():
        assert np.array_equal(state[f"{path}.weight"].numpy(), made.weight.T), path


def test_settings_beside_the_configuration_are_found(stored: Callable[..., tuple[Path, dict[str, Made]]]) -> None:
    folder, layers = stored(LAYERS["gptq-v1-4"])
    settings = dict(next(iter(layers.values())).settings)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"], settings["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    model = LocalModel("local", str(folder)).load("cpu", "float32")
    assert model.on_disk is not None and (model.on_disk.format, model.on_disk.made_by) == ("gptq", "numpy:1")


@pytest.mark.parametrize("beside", [False, True], ids=["newer", "older"])
def test_settings_of_model_optimizer(beside: bool, stored: Callable[..., tuple[Path, dict[str, Made]]]) -> None:
    """Older versions write them into a file of their own; layers may differ; patterns name the layers left out."""
    apart = {LAST: None, "model.layers.0.self_attn.q_proj": LAYERS["modelopt-FP8"]}
    folder, layers = stored(LAYERS["modelopt-NVFP4"], apart=apart)
    algorithm: dict[str, Any] = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": "FP8",
        "quantized_layers": {"model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"}, "": {"quant_algo": "NVFP4"}},
    }
    maker = {"producer": {"name": "modelopt", "version": "0.47.0"}}
    if beside:
        describe(folder, quantization_config=None)
        told = {**maker, "quantization": {**algorithm, "exclude_modules": ["*layers.1.mlp.down*"]}}
        (folder / "hf_quant_config.json").write_text(json.dumps(told))
    else:
        write_settings(folder, {"quant_method": "modelopt", **maker, **algorithm, "ignore": ["*layers.1.mlp.down*"]})
    model = LocalModel("local", str(folder)).load("cpu", "float32")
    state = model.network.state_dict()
    assert all(np.array_equal(state[f"{path}.weight"].numpy(), made.weight) for path, made in layers.items())
    assert model.on_disk is not None and model.on_disk.made_by == "modelopt 0.47.0"
    assert "rounded inputs and keys and values" in model.on_disk.notes[0]


AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "autoround_version": "0.16.1"}


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("gptq-no-g-idx", "auto_round:auto_gptq"),
        ("gptq-2-no-g-idx", "auto_round"),
        ("gptq-2-no-g-idx", "auto_round:gptqmodel"),
        ("awq", "auto_round:auto_awq"),
    ],
)
def test_the_layout_of_auto_round(name: str, packing: str, stored: Callable[..., tuple[Path, dict[str, Made]]]) -> None:
    """The tensors are those of GPTQ or AWQ; one layer has other bits and other groups than the rest."""
    other = partial(
        made_of.gptq, bits=8, group=16, version=1 if packing.endswith("auto_gptq") else 2, with_groups=False
    )
    apart = {} if name == "awq" else {"model.layers.1.mlp.down_proj": other}
    folder, layers = stored(LAYERS[name], apart=apart)
    write_settings(folder, AUTO_ROUND | {"bits": 4, "group_size": 32, "packing_format": packing})
    model = LocalModel("local", str(folder)).load("cpu", "float32")
    state = model.network.state_dict()
    for path, made in layers.items():
        assert np.array_equal(state[f"{path}.weight"].numpy(), made.weight), path
    assert len(layers) == 14 - len(apart)
    assert model.on_disk is not None and model.on_disk.made_by == "auto-round 0.16.1"
    assert model.on_disk.weights.get("8 bits", 0) == sum(state[f"{path}.weight"].numel() for path in apart)


@pytest.mark.parametrize("told", ["group_size", "extra_config"])
def test_groups_of_auto_round_need_not_divide_the_inputs(
    told: str, stored: Callable[..., tuple[Path, dict[str, Made]]]
) -> None:
    """Of 96 inputs in groups of 64, the last group has 32; two groups of 48 would read without an error."""
    folder, layers = stored(partial(made_of.gptq, group=64, with_groups=False))
    sizes: dict[str, Any] = {"group_size": {"group_size": 64}}
    sizes["extra_config"] = {"group_size": 32, "extra_config": {r".*\.layers\..*": {"bits": 4, "group_size": 64}}}
    write_settings(folder, AUTO_ROUND | {"bits": 4} | sizes[told])
    model = LocalModel("local", str(folder)).load("cpu", "float32")
    state = model.network.state_dict()
    for path, made in layers.items():
        assert np.array_equal(state[f"{path}.weight"].numpy(), made.weight), path
    assert model.on_disk is not None and model.on_disk.group == 64


def test_a_group_that_names_one_layer_is_not_that_of_the_others(
    stored: Callable[..., tuple[Path, dict[str, Made]]],
) -> None:
    """Whatever the order of the groups: a path without dots looks like the name of a class."""
    folder, layers = stored(LAYERS["ct-packed-4"])
    settings = dict(next(iter(layers.values())).settings)
    (rest,) = settings["config_groups"].values()
    head = rest | {"targets": ["lm_head"], "weights": rest["weights"] | {"num_bits": 8}}
    write_settings(folder, settings | {"config_groups": {"group_0": head, "group_1": rest}})
    state = LocalModel("local", str(folder)).load("cpu", "float32").network.state_dict()
    for path, made in layers.items():
        assert np.array_equal(state[f"{path}.weight"].numpy(), made.weight), path


@pytest.mark.parametrize("names", [LAST, r"re:.*\.1\.mlp\.down_proj"])
def test_a_layer_of_several_groups_belongs_to_the_one_that_the_library_takes(
    names: str, stored: Callable[..., tuple[Path, dict[str, Made]]]
) -> None:
    """A name before any pattern, and patterns in the order of the alphabet, whatever the order of the groups."""
    other = partial(made_of.packed, bits=8)
    folder, layers = stored(LAYERS["ct-packed-4"], apart={LAST: other})
    (rest,) = next(iter(layers.values())).settings["config_groups"].values()
    apart = rest | {"targets": [names], "weights": rest["weights"] | {"num_bits": 8}}
    groups = {"group_0": rest | {"targets": [r"re:.*\.mlp\..*", r"re:.*_proj$"]}, "group_1": apart}
    write_settings(folder, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups})
    model = LocalModel("local", str(folder)).load("cpu", "float32")
    state = model.network.state_dict()
    for path, made in layers.items():
        assert np.array_equal(state[f"{path}.weight"].numpy(), made.weight), path
    assert model.on_disk is not None and model.on_disk.weights["8 bits"] == state[f"{LAST}.weight"].numel()


def test_a_group_may_round_inputs_alone(stored: Callable[..., tuple[Path, dict[str, Made]]]) -> None:
    """As of attention; a cache of rounded keys and values is a setting of its own. The record says both."""
    folder, layers = stored(LAYERS["ct-packed-4"])
    settings = dict(next(iter(layers.values())).settings)
    inputs = {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8, "type": "float"}}
    groups = dict(settings["config_groups"]) | {"attention": inputs}
    write_settings(folder, settings | {"config_groups": groups, "kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    model = LocalModel("local", str(folder)).load("cpu", "float32")
    state = model.network.state_dict()
    assert all(np.array_equal(state[f"{path}.weight"].numpy(), made.weight) for path, made in layers.items())
    assert model.on_disk is not None and "rounded activations and keys and values," in model.on_disk.notes[0]


def test_torchao_may_have_settings_of_each_layer(stored: Callable[..., tuple[Path, dict[str, Made]]]) -> None:
    """Where they name the coded layers, no others need a name; each layer's code has the width that they state."""
    left = "model.layers.1.mlp.down_proj"
    folder, layers = stored(LAYERS["torchao-int8"], apart={left: None})
    wide = {"_type": "Int8WeightOnlyConfig", "_data": {}}
    narrow = {
        "_type": "Int8DynamicActivationIntxWeightConfig",
        "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": "int4"}},
    }
    each = {r"re:.*\.layers\.0\..*": narrow, "model.layers.0.mlp.up_proj": wide}
    each |= {path: wide for path in layers if ".1." in path}
    told = {"_type": "FqnToConfig", "_data": {"fqn_to_config": each, "module_fqn_to_config": each}}
    write_settings(folder, {"quant_method": "torchao", "quant_type": {"default": told}})
    model = LocalModel("local", str(folder)).load("cpu", "float32")
    state = model.network.state_dict()
    for path, made in layers.items():
        assert np.array_equal(state[f"{path}.weight"].numpy(), made.weight), path
    assert torch.equal(state[f"{left}.weight"], load_file(folder / "model.safetensors")[f"{left}.weight"].float())
    assert model.on_disk is not None and "Int8DynamicActivationIntxWeightConfig" in model.on_disk.notes[0]
    narrow_ones = [made for path, made in layers.items() if ".0." in path and not path.endswith("up_proj")]
    assert model.on_disk.weights["4 bits"] == sum(made.weight.size for made in narrow_ones)


def test_rotations_inside_the_weights_are_read(stored: Callable[..., tuple[Path, dict[str, Made]]]) -> None:
    folder, layers = stored(LAYERS["ct-packed-4"])
    inside = {"R1": {"apply": [{"location": "weight_input"}, {"location": "weight_output"}]}}
    settings = dict(next(iter(layers.values())).settings) | {"transform_config": {"config_groups": inside}}
    write_settings(folder, settings)
    state = LocalModel("local", str(folder)).load("cpu", "float32").network.state_dict()
    assert all(np.array_equal(state[f"{path}.weight"].numpy(), made.weight) for path, made in layers.items())


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "marlin": ("gptq-v1-4", {"checkpoint_format": "marlin"}, "in the layout marlin; gptq, gptq_v2 can be read"),
    "gemv": ("awq", {"version": "gemv"}, "in the layout gemv; only gemm can be read"),
    "awq-3": ("awq", {"bits": 3}, "of 3 bits; the gemm layout has 4"),
    "words": ("gptq-v1-4", {"bits": "four"}, "bits='four', which must be a whole number"),
    "groups": ("ct-int-channel", {"config_groups": {}}, "has no config_groups"),
    "sparse": (
        "ct-int-channel",
        {"sparsity_config": {"format": "sparse-96"}},
        "in the sparse layout sparse-96; sparse-24-bitmask and sparse-bitmask can be read",
    ),
    "sparse groups": (
        "ct-packed-4",
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        "config_groups.group_0 is not symmetric FP8 or int8",
    ),
    "blocks": ("fp8", {"weight_block_size": [0, 1]}, "must be two sizes"),
    "rotated inputs": (
        "ct-packed-4",
        {
            "transform_config": {
                "config_groups": {"v": {"apply": [{"location": "weight_input"}, {"location": "input"}]}}
            }
        },
        "transform_config.config_groups.v, which multiplies the input of layers by a matrix at run time",
    ),
    "modelopt": ("modelopt-NVFP4", {"quant_algo": "NVFP4_SVD"}, "with quant_algo=NVFP4_SVD; FP8, .* can be read"),
    "auto-round packing": (
        "gptq-no-g-idx",
        AUTO_ROUND | {"packing_format": "auto_round:llm_compressor"},
        "with packing_format=auto_round:llm_compressor; auto_round:auto_gptq, .* and auto_round:auto_awq can be read",
    ),
    "auto-round inputs": ("gptq-no-g-idx", AUTO_ROUND | {"act_bits": 8}, "with data_type=int, act_bits=8; those with"),
    "auto-round floats": ("gptq-no-g-idx", AUTO_ROUND | {"data_type": "mx_fp"}, "with data_type=mx_fp, act_bits=16;"),
    "auto-round rotation": ("gptq-no-g-idx", AUTO_ROUND | {"rotation_config": {"a": 1}}, "rotation_config; those with"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_are_not_read_are_one_line(
    name: str, stored: Callable[..., tuple[Path, dict[str, Made]]]
) -> None:
    layer, changes, message = WRONG[name]
    folder, layers = stored(LAYERS[layer])
    write_settings(folder, dict(next(iter(layers.values())).settings) | changes)
    with pytest.raises(BadInput, match=message) as caught:
        LocalModel("local", str(folder)).skeleton()
    assert "\n" not in str(caught.value)


DAMAGE: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "no bits": ("gptq-no-g-idx", ".qzeros", lambda t: t[:, :1].clone(), "has codes of 0 bits; a GPTQ checkpoint has"),
    "scales": ("gptq-v1-4", ".scales", lambda t: t[:, :-1].clone(), r"\.scales has the shape|\.qzeros has the shape"),
    "zeros": ("gptq-v1-4", ".qzeros", lambda t: None, r"but not .*\.qzeros, without which"),
    "words": ("gptq-v1-4", ".qweight", lambda t: t[:-1].clone(), "which does not fit any number of bits"),
    "groups": ("gptq-act-order", ".g_idx", lambda t: t + 7, r"\.g_idx contains group"),
    "awq": ("awq", ".qzeros", lambda t: t[:, :-1].clone(), r"\.qzeros has the shape"),
    "shape": ("ct-packed-4", ".weight_shape", lambda t: t * 2, r"\.weight_packed has .* words per row"),
    "dense": ("ct-int-channel", ".weight", lambda t: t.half(), "so it is not compressed yet"),
    "global": ("ct-nvfp4", ".weight_global_scale", lambda t: None, r"but not .*\.weight_global_scale"),
    "state": (
        "bnb-nf4",
        ".weight.quant_state.bitsandbytes__nf4",
        lambda t: t[:9].clone(),
        "is not in the form that bitsandbytes",
    ),
    "bytes": ("bnb-nf4", ".weight", lambda t: t[:-1].clone(), "bytes, but its settings give the shape"),
    "int8": ("bnb-int8", ".SCB", lambda t: t[:-1].clone(), r"\.SCB has the shape"),
    "half": ("sparse-24", ".compressed", lambda t: t[:-1].clone(), "values, which is not half of"),
    "bits": ("sparse-24", ".bitmask", lambda t: t ^ 1, "does not set two bits of each four"),
    "sparse bits": ("sparse-any", ".bitmask", lambda t: t | 1, r"\.bitmask sets .* bits for .* values"),
    "sparse scale": ("sparse-24-fp8", ".weight_scale", lambda t: t[:-1].clone(), r"\.weight_scale has .* numbers"),
    "not sparse": ("sparse-24-fp8", ".bitmask", lambda t: None, "as codes without a bitmask beside sparse layers"),
    "cells": ("fp8", ".weight_scale_inv", lambda t: t[:-1].clone(), r"\.weight_scale_inv has the shape"),
    "table": (
        "hqq-4-axis-1",
        ".W_q",
        lambda t: t[:-1].clone(),
        r"W_q is U8 \[.*\], which does not hold .* codes in the",
    ),
    "word type": ("hqq-3-axis-1", ".W_q", lambda t: t.view(torch.float32), "W_q is F32 .* in the packing 3bit_32"),
    "second scale": ("modelopt-NVFP4", ".weight_scale_2", lambda t: None, r"but not .*\.weight_scale_2, without which"),
    "half scale": ("modelopt-NVFP4", ".weight_scale", lambda t: t[:-1].clone(), r"\.weight_scale has the shape"),
    "4-bit codes": ("modelopt-FP8", ".weight", lambda t: t.view(torch.int8).int(), "is stored as I32 with scales F32"),
    "inputs": ("modelopt-W4A16_AWQ", ".pre_quant_scale", lambda t: t[:-1].clone(), r"\.pre_quant_scale has the shape"),
    "zero": ("hqq-4-axis-0", ".zero", lambda t: t[:, :-1].clone(), r"\.zero is F32 \[.*\], which must be .* floats"),
    "no scale": ("hqq-4-axis-0", ".scale", lambda t: None, r"but not .*\.scale, without which"),
    "both": ("hqq-together", ".zero_scale", lambda t: t[:1].clone(), r"\.zero_scale is F32 .* must be .* floats"),
    "no axis": ("hqq-4-axis-0", ".axis", lambda t: None, r"but not .*\.axis, without which"),
    "axes": ("hqq-4-axis-0", ".axis", lambda t: t + 2, "has axis=2 and group_size=16; the axis must be 0 or 1"),
    "size": ("hqq-4-axis-0", ".group_size", lambda t: t - 3, "group_size=13; .* must divide its .* weights"),
    "sizes": ("hqq-4-axis-0", ".shape", lambda t: t[:1].clone(), r"\.shape is \[.*\], which must be two sizes"),
    "number": ("hqq-4-axis-0", ".nbits", lambda t: t.repeat(2), r"\.nbits has the shape \[2\], which must be one"),
    "packing": ("hqq-4-axis-0", ".packing", lambda t: t[:4].clone(), "is packed as '4bit'; 8bit_u8, .* can be read"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_tensors_that_do_not_fit_are_one_line(name: str, stored: Callable[..., tuple[Path, dict[str, Made]]]) -> None:
    layer, ending, change, message = DAMAGE[name]
    folder, layers = stored(LAYERS[layer])
    state = load_file(folder / "model.safetensors")
    key = next(iter(layers)) + ending
    changed = change(state.pop(key))
    save_file(state if changed is None else state | {key: changed}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=message) as caught:
        LocalModel("local", str(folder)).load("cpu", "float32")
    assert "\n" not in str(caught.value)


def test_a_layer_of_another_network_is_one_line(stored: Callable[..., tuple[Path, dict[str, Made]]]) -> None:
    folder, _ = stored(LAYERS["gptq-v1-4"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(
        BadInput, match=r"represents weights of shape \[64, 96\], but the configuration describes \[64, 128\]"
    ):
        LocalModel("local", str(folder)).load("cpu", "float32")


def test_a_file_that_is_cut_short_is_one_line(stored: Callable[..., tuple[Path, dict[str, Made]]]) -> None:
    folder, _ = stored(LAYERS["awq"])
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"model.safetensors is damaged or cut short \(.*\); copy the whole file again"):
        LocalModel("local", str(folder)).load("cpu", "float32")


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (
            "no-such-method",
            "which neither this program nor transformers knows; gptq, awq, .* and GGUF files can be read",
        ),
        (
            "vptq",
            "it is compressed by vptq, which only transformers can read; this program reads gptq, awq, .* and GGUF",
        ),
        ("eetq", "it is compressed by eetq, which only transformers can read"),
        ("quanto", "it is compressed by quanto, which only transformers can read"),
    ],
)
def test_other_formats_are_one_line(
    method: str, match: str, stored: Callable[..., tuple[Path, dict[str, Made]]]
) -> None:
    folder, _ = stored(LAYERS["awq"])
    write_settings(folder, {"quant_method": method})
    with pytest.raises(BadInput, match=match) as caught:
        LocalModel("local", str(folder)).load("cpu", "float32")
    assert "\n" not in str(caught.value)


def test_a_readable_format_is_not_called_unreadable(stored: Callable[..., tuple[Path, dict[str, Made]]]) -> None:
    folder, _ = stored(LAYERS["awq"])
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelUnavailable, match=r"cannot be read \(.*\); give a folder saved by save_pretrained"):
        LocalModel("local", str(folder)).load("cpu", "float32")


def test_a_declaration_that_is_no_mapping_is_one_line(
    stored: Callable[..., tuple[Path, dict[str, Made]]],
) -> None:
    folder, _ = stored(LAYERS["awq"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": ["awq"]}))
    with pytest.raises(BadInput, match=r"quantization_config=\['awq'\], which must be a mapping") as caught:
        LocalModel("local", str(folder)).load("cpu", "float32")
    assert "\n" not in str(caught.value)


def test_memory_holds_the_model_and_one_layer(
    stored: Callable[..., tuple[Path, dict[str, Made]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader's threads run ahead, but no two layers are decoded at a time."""
    folder, _ = stored(LAYERS["gptq-v1-4"])
    decoding, most = 0, 0
    from knowledge_compression.models.checkpoints.gptq import Gptq

    before = Gptq.decode

    def counted(self: Gptq, layer: str, parts: Any) -> torch.Tensor:
        nonlocal decoding, most
        decoding += 1
        most = max(most, decoding)
        weight = before(self, layer, parts)
        decoding -= 1
        return weight

    monkeypatch.setattr(Gptq, "decode", counted)
    LocalModel("local", str(folder)).load("cpu", "float32")
    assert most == 1
