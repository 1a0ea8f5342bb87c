"""Files of compressed models, tensor by tensor, against decoders in numpy that share nothing with the writers."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import decoders
from helpers.networks import VOCABULARY, build_network, logits_of
from knowledge_compression.compression.methods.awq import Awq
from knowledge_compression.compression.methods.fp8 import Fp8
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.int8_static import Int8Static
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.mxfp4 import Mxfp4
from knowledge_compression.compression.methods.nf4 import Nf4
from knowledge_compression.compression.methods.nvfp4 import Nvfp4
from knowledge_compression.compression.methods.pipeline import Pipeline
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.smoothquant import SmoothQuant
from knowledge_compression.compression.writing.gptq import GptqWriter
from knowledge_compression.compression.writing.writers import WRITERS, check_form
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.targets import linear_layers

ALL = Target("all", ["encoder_att", "decoder_self_att", "cross_att", "ff"])


WIDE: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64},
    "bert": {},
}
METHODS: dict[str, Any] = {
    "rtn4-g16": Rtn(bits=4, group_size=16, scale_bits=16),
    "rtn4-sym": Rtn(bits=4, symmetric=True, scale_bits=16),
    "rtn8-sym": Rtn(bits=8, symmetric=True, scale_bits=16),
    "rtn3-wide-scales": Rtn(bits=3, group_size=32),
    "gptq4-g16-sym": Gptq(bits=4, group_size=16, symmetric=True),
    "gptq3": Gptq(bits=3),
    "gptq2-g32-act-order": Gptq(bits=2, group_size=32, static_groups=False),
    "awq4-g16": Awq(bits=4, group_size=16, fold=True),
    "fp8": Fp8(),
    "fp8-tensor": Fp8(granularity="tensor"),
    "fp8-block": Fp8(granularity="block", block_size=40),
    "mxfp4": Mxfp4(),
    "nvfp4": Nvfp4(),
    "fp8-inputs": Fp8(activations=True),
    "mxfp4-inputs": Mxfp4(activations=True),
    "int8-inputs": Int8Dynamic(granularity="per_channel"),
    "int8-static-inputs": Int8Static(forward_dtype="float32"),
    "smoothquant-inputs": SmoothQuant(fold=True, forward_dtype="float32"),
    "nf4": Nf4(),
    "nf4-b32": Nf4(block_size=32),
}
DECODERS = {"gptq": decoders.gptq, "awq": decoders.awq, "compressed-tensors": decoders.compressed_tensors}
DECODERS["bitsandbytes"] = decoders.bitsandbytes
_GPTQ = ["rtn4-g16", "awq4-g16", "rtn4-sym", "rtn8-sym", "gptq4-g16-sym", "gptq3", "gptq2-g32-act-order"]
HELD = {
    "gptq": {"llama": _GPTQ, "opt": _GPTQ[-3:], "gpt2": _GPTQ[-3:]},
    "awq": {"llama": ["awq4-g16", "rtn4-g16", "rtn4-sym", "gptq4-g16-sym"], "opt": ["awq4-g16", "rtn4-g16"]},
    "compressed-tensors": {
        "llama": [name for name in METHODS if "act-order" not in name and "nf4" not in name],
        "opt": ["gptq3", "nvfp4", "int8-static-inputs"],
    },
    "bitsandbytes": {"llama": ["nf4", "nf4-b32"], "opt": ["nf4"]},
}
CASES = [(form, family, name) for form, held in HELD.items() for family, names in held.items() for name in names]


def small(architecture: str, tokenizer: Any) -> Model:
    return Model(build_network(architecture, **WIDE[architecture]), tokenizer, architecture)


def compressed_by(name: str, model: Model, target: Target = ALL) -> Model:
    windows = torch.randint(7, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2))
    METHODS[name].compress(model, target.select(model), windows)
    return model


@pytest.mark.parametrize(("form", "architecture", "name"), CASES)
def test_a_file_holds_the_weights_and_is_read_back(
    form: str, architecture: str, name: str, tiny_tokenizer: object, tmp_path: Path
) -> None:
    model = small(architecture, tiny_tokenizer)
    check_form(form, METHODS[name], ALL.select(model))
    compressed_by(name, model)
    weights = {layer.path: layer.weight.clone() for layer in ALL.select(model)}
    before = model.network.state_dict()
    WRITERS[form].write(model, tmp_path / "written")

    state = load_file(tmp_path / "written" / "model.safetensors")
    settings = json.loads((tmp_path / "written" / "config.json").read_text())["quantization_config"]
    for path, weight in weights.items():
        layer = {key.removeprefix(f"{path}."): tensor for key, tensor in state.items() if key.startswith(f"{path}.")}
        assert np.array_equal(DECODERS[form](layer, settings), weight.numpy()), path
    rest = [key for key in state if key in before and key.rpartition(".")[0] not in weights]
    assert len(rest) > 3 and all(torch.equal(state[key], before[key]) for key in rest)

    back = LocalModel("local", str(tmp_path / "written")).load("cpu", "float32")
    for layer_back in ALL.select(back):
        assert torch.equal(layer_back.weight, weights[layer_back.path]), layer_back.path
        assert (layer_back.bias is None) == (model.network.get_submodule(layer_back.path).bias is None)
    assert torch.equal(logits_of(back), logits_of(model)) is not name.endswith("inputs")
    assert back.on_disk is not None and back.on_disk.format.startswith(form)
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


@pytest.mark.parametrize("name", ["gptq4-g16-sym", "gptq3", "gptq2-g32-act-order"])
def test_the_settings_of_a_gptq_file(name: str, tiny_tokenizer: object, tmp_path: Path) -> None:
    method, model = METHODS[name], compressed_by(name, small("llama", tiny_tokenizer))
    GptqWriter().write(model, tmp_path / "written")
    config = json.loads((tmp_path / "written" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "written" / "quantize_config.json").read_text())
    assert (config["quant_method"], config["bits"], config["sym"]) == ("gptq", method.bits, method.symmetric)
    assert config["group_size"] == (method.group_size or -1)
    assert config["checkpoint_format"] == ("gptq" if method.symmetric else "gptq_v2")
    assert not config["lm_head"] and "dynamic" not in config
    assert config["desc_act"] == ("act-order" in name)


def test_what_is_not_coded_is_as_narrow_as_it_can_be(tiny_tokenizer: object, tmp_path: Path) -> None:
    """Weights that came from float16 or bfloat16 go back into it; others stay what they are."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = small("llama", tiny_tokenizer)
        with torch.no_grad():
            for parameter in model.network.parameters():
                parameter.copy_(parameter.to(dtype))
            if dtype != torch.float16:  # out of its reach
                model.network.model.embed_tokens.weight.mul_(2.0**-30)
        compressed_by("rtn4-g16", model)
        WRITERS["gptq"].write(model, tmp_path / "written")
        config = json.loads((tmp_path / "written" / "config.json").read_text())
        state = load_file(tmp_path / "written" / "model.safetensors")
        assert config["dtype"] == str(state["model.norm.weight"].dtype).removeprefix("torch.")
        assert {t.dtype for n, t in state.items() if n.endswith("norm.weight") or "embed" in n} == {dtype}
        assert model.head_is_tied and "lm_head.weight" not in state


@pytest.mark.parametrize("form", ["awq", "compressed-tensors"])
def test_layers_left_alone_are_named_by_their_paths(form: str, tiny_tokenizer: object, tmp_path: Path) -> None:
    model = compressed_by("rtn4-sym", small("llama", tiny_tokenizer), Target("att", ["decoder_self_att"]))
    WRITERS[form].write(model, tmp_path / "written")
    settings = json.loads((tmp_path / "written" / "config.json").read_text())["quantization_config"]
    left = settings["ignore" if form == "compressed-tensors" else "modules_to_not_convert"]
    assert sorted(left) == sorted(
        [f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up", "down")] + ["lm_head"]
    )


def test_files_say_that_inputs_are_rounded(tiny_tokenizer: object, tmp_path: Path) -> None:
    for name in ("fp8-inputs", "mxfp4-inputs", "fp8"):
        WRITERS["compressed-tensors"].write(compressed_by(name, small("llama", tiny_tokenizer)), tmp_path / name)
        settings = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        inputs = settings["config_groups"]["group_0"]["input_activations"]
        told = LocalModel("local", str(tmp_path / name)).load("cpu", "float32").on_disk
        assert told is not None and bool(told.notes) == (inputs is not None) == name.endswith("inputs")
        if inputs:
            assert inputs["dynamic"] and inputs["strategy"] == {"fp8-inputs": "token"}.get(name, "group")


@pytest.mark.parametrize("steps", [127.0, 127.5])
def test_steps_of_inputs_that_transformers_does_not_take_are_told(
    steps: float, tiny_tokenizer: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small("llama", tiny_tokenizer)
    Int8Dynamic(granularity="per_channel", input_steps=steps).compress(model, ALL.select(model), None)
    WRITERS["compressed-tensors"].write(model, tmp_path / "written")
    assert ("compression.input_steps=127.5 rounds alike" in caplog.text) == (steps == 127)


def test_a_fixed_range_of_inputs_is_that_of_the_run(tiny_tokenizer: object, tmp_path: Path) -> None:
    """Seven bits: beyond the range, readers of the file clip where the run did."""
    model = compressed_by("int8-static-inputs", small("llama", tiny_tokenizer))
    WRITERS["compressed-tensors"].write(model, tmp_path / "written")
    settings = json.loads((tmp_path / "written" / "config.json").read_text())["quantization_config"]
    inputs = settings["config_groups"]["group_0"]["input_activations"]
    assert inputs == {"num_bits": 7, "type": "int", "symmetric": False, "dynamic": False, "strategy": "tensor"}
    state, path = load_file(tmp_path / "written" / "model.safetensors"), "model.layers.0.mlp.down_proj"
    scale, zero = (state[f"{path}.{name}"].numpy() for name in ("input_scale", "input_zero_point"))
    assert zero.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == zero.shape == (1,)
    layer = model.network.get_submodule(path)
    values = torch.linspace(-9, 9, 96)[None] * layer.input_scale * 16
    codes = np.clip(np.round(values.numpy() / scale) + zero, -64, 63)
    assert codes.min() == -64 and codes.max() == 63
    assert np.array_equal(codes, layer.round_inputs(values)[0].numpy().astype(int) - 64)


REFUSED: dict[str, tuple[str, str, Any, str]] = {
    "plain numbers": ("awq", "llama", Magnitude(sparsity=0.5), "makes no codes that awq can hold; or choose .*=true"),
    "factors": ("awq", "llama", Awq(group_size=16), "hold; choose compression.fold=true; or choose .*=true"),
    "three bits": (
        "awq",
        "llama",
        Gptq(bits=3),
        r"codes of 4 bits, not 3; or choose .*=true or gptq or compressed-tensors",
    ),
    "wide scales": ("awq", "llama", Rtn(), r"scales of 16 bits; .* choose .*=true or compressed-tensors"),
    "act-order": (
        "compressed-tensors",
        "llama",
        METHODS["gptq2-g32-act-order"],
        r"neighbours; choose compression\.static_groups=true; or choose .*=true or gptq",
    ),
    "short groups": ("compressed-tensors", "llama", Rtn(group_size=48), "48 does not divide the 64 inputs of"),
    "conv": (
        "compressed-tensors",
        "gpt2",
        Rtn(scale_bits=16),
        r"holds nn\.Linear, and .* is Conv1D; or choose .* gptq",
    ),
    "floats": ("gptq", "llama", Nvfp4(), "holds integers, not NVFP4; or choose .*=true or compressed-tensors"),
    "each token's scale": ("compressed-tensors", "llama", Nvfp4(activations=True), "needs one scale for all inputs"),
    "one scale for a batch": (
        "compressed-tensors",
        "llama",
        Int8Dynamic(),
        "choose compression.granularity=per_",
    ),
    "divided inputs": ("compressed-tensors", "llama", SmoothQuant(), "hold; choose compression.fold=true"),
    "scales of scales": (
        "bitsandbytes",
        "llama",
        Nf4(double_quant=True),
        "choose compression.double_quant=false",
    ),
    "odd blocks": (
        "bitsandbytes",
        "llama",
        Nf4(block_size=48),
        "takes blocks of 32, .* weights, not 48; or choose .*=true",
    ),
    "levels": ("compressed-tensors", "llama", Nf4(), "does not hold NF4; or choose .*=true or bitsandbytes"),
    "words": ("gptq", "bert", Rtn(bits=3, scale_bits=16), "do not fill whole words"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_form_that_cannot_hold_the_result_names_those_that_can(case: str, tiny_tokenizer: object) -> None:
    form, architecture, method, message = REFUSED[case]
    model = small(architecture, tiny_tokenizer)
    with pytest.raises(BadInput, match=message) as caught:
        check_form(form, method, ALL.select(model))
    assert "\n" not in str(caught.value)


def test_layers_left_alone_are_named(tiny_tokenizer: object, tmp_path: Path) -> None:
    network = build_network("llama", hidden_size=64, intermediate_size=96, head_dim=32)
    model = Model(network, tiny_tokenizer, "llama")  # type: ignore[arg-type]
    Rtn(symmetric=True, scale_bits=16).compress(model, Target("att", ["decoder_self_att"]).select(model), None)
    GptqWriter().write(model, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "quantize_config.json").read_text())
    assert r"-:^model\.layers\.1\.mlp\.up_proj$" in config["dynamic"]
    assert len(config["dynamic"]) == 6


def test_a_coded_final_layer_is_named_among_the_targets(tiny_tokenizer: object, tmp_path: Path) -> None:
    """To vLLM 0.32 it is no `Linear`, and unnamed it is taken for floats."""
    model = small("llama", tiny_tokenizer)
    Rtn(bits=4, symmetric=True).compress(model, Target("final", ["final"]).select(model), None)
    WRITERS["compressed-tensors"].write(model, tmp_path / "written")
    settings = json.loads((tmp_path / "written" / "config.json").read_text())["quantization_config"]
    assert settings["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert "lm_head" not in settings["ignore"] and len(settings["ignore"]) == 14
    back = LocalModel("local", str(tmp_path / "written")).load("cpu", "float32")
    assert torch.equal(back.network.lm_head.weight, model.network.lm_head.weight)


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
    with pytest.raises(BadInput, match="no layer whose weights come from codes"):
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
    with pytest.raises(BadInput, match=r"groups of one size, and 10 does not divide the 16 inputs of model\.layers\.0"):
        GptqWriter().write(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_form_that_does_not_fit_is_refused_before_anything_is_computed(tiny_model: Callable[[str], Model]) -> None:
    targets = ALL.select(tiny_model("llama"))
    with pytest.raises(BadInput, match=r"output.save_model=gtpq does not exist \(did you mean gptq\?\); choose one of"):
        check_form("gtpq", Rtn(), targets)
    with pytest.raises(BadInput, match=r"compression=magnitude makes no codes that gptq can hold; or choose .*=true"):
        check_form("gptq", Magnitude(sparsity=0.5), targets)
    with pytest.raises(BadInput, match=r"scales of 16 bits; choose compression\.scale_bits=16"):
        check_form("gptq", Pipeline([Magnitude(sparsity=0.5), Rtn()]), targets)
    check_form("gptq", Pipeline([Magnitude(sparsity=0.5), Rtn(scale_bits=16)]), targets)
    check_form(True, Magnitude(sparsity=0.5), targets)


MOE = {"mixtral": {"hidden_size": 64, "intermediate_size": 32}, "qwen3_moe": {"hidden_size": 64}, "olmoe": {}}
MOE["qwen3_moe"]["moe_intermediate_size"] = MOE["olmoe"]["intermediate_size"] = 32
MOE["olmoe"]["hidden_size"] = 64
EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe.experts.{}.{}", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.experts.{}.{}", ("gate_proj", "up_proj", "down_proj")),
    "olmoe": ("mlp.experts.{}.{}", ("gate_proj", "up_proj", "down_proj")),
}
EXPERTS_HELD = [
    ("mixtral", "gptq", Gptq(bits=4, group_size=32)),
    ("qwen3_moe", "gptq", Gptq(bits=3, symmetric=True)),
    ("olmoe", "awq", Rtn(bits=4, group_size=16, scale_bits=16)),
    ("qwen3_moe", "compressed-tensors", Rtn(bits=2, symmetric=True, group_size=32)),
    ("mixtral", "compressed-tensors", Nvfp4()),
    ("qwen3_moe", "compressed-tensors", Fp8(granularity="block", block_size=16)),
]


def mixture(name: str, tokenizer: Any) -> Model:
    return Model(build_network(name, head_dim=32, **MOE[name]), tokenizer, name)


@pytest.mark.parametrize(("architecture", "form", "method"), EXPERTS_HELD, ids=lambda case: str(case)[:20])
@pytest.mark.parametrize("only", [None, [1]])
def test_experts_are_stored_one_by_one_under_the_names_of_other_programs(
    architecture: str, form: str, method: Any, only: list[int] | None, tiny_tokenizer: object, tmp_path: Path
) -> None:
    model = mixture(architecture, tiny_tokenizer)
    target = Target("experts", ["experts"] if only else ["experts", "decoder_self_att"], experts=only)
    targets = target.select(model)
    check_form(form, method, targets)
    method.compress(model, targets, torch.randint(7, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(2)))
    WRITERS[form].write(model, tmp_path / "written")

    state = load_file(tmp_path / "written" / "model.safetensors")
    settings = json.loads((tmp_path / "written" / "config.json").read_text())["quantization_config"]
    pattern, (gate, up, down) = EXPERT_NAMES[architecture]
    for block, number in product(range(2), range(4)):
        bank = model.network.model.layers[block].mlp.experts
        inner = bank.gate_up_proj.shape[1] // 2
        wanted = {gate: bank.gate_up_proj[number, :inner], up: bank.gate_up_proj[number, inner:]}
        wanted[down] = bank.down_proj[number]
        for name, weight in wanted.items():
            path = f"model.layers.{block}.{pattern.format(number, name)}."
            layer = {key.removeprefix(path): tensor for key, tensor in state.items() if key.startswith(path)}
            coded = only is None or number in only
            read = DECODERS[form](layer, settings) if coded else layer["weight"].float().numpy()
            assert np.array_equal(read, weight.detach().numpy()), path
            left = settings.get("ignore", settings.get("modules_to_not_convert")) or settings.get("dynamic", {})
            named = any(path.rstrip(".").replace(".", r"\.") in one or path.rstrip(".") == one for one in left)
            assert named is not coded
    assert not any(".experts.gate_up_proj" in key for key in state)

    back = LocalModel("local", str(tmp_path / "written")).load("cpu", "float32")
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, back.network.state_dict()[name]), name
    assert back.on_disk is not None and back.on_disk.format == form


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_experts_and_routers_left_alone_are_named_as_other_programs_look_for_them(
    form: str, tiny_tokenizer: object, tmp_path: Path
) -> None:
    """vLLM 0.32 looks for `experts` (GPTQ, AWQ) or `experts.0.w1` (compressed-tensors), by the names in the files."""
    model = mixture("mixtral", tiny_tokenizer)
    Rtn(bits=4, symmetric=True, group_size=32, scale_bits=16).compress(
        model, Target("att", ["decoder_self_att"]).select(model), None
    )
    WRITERS[form].write(model, tmp_path / "written")
    settings = json.loads((tmp_path / "written" / "config.json").read_text())["quantization_config"]
    left = settings.get("ignore", settings.get("modules_to_not_convert")) or settings.get("dynamic", {})
    for block in (0, 1):
        path = f"model.layers.{block}.block_sparse_moe"
        experts = [f"{path}.experts.{number}.{name}" for number in range(4) for name in ("w1", "w2", "w3")]
        for wanted in (*experts, f"{path}.experts", f"{path}.gate"):
            assert (f"-:^{wanted}$".replace(".", r"\.") if form == "gptq" else wanted) in left
    assert not any("self_attn" in one for one in left)


@pytest.mark.parametrize("architecture", ["gpt_oss", "granitemoe"])
def test_experts_that_files_hold_in_one_tensor_are_refused(architecture: str, tiny_tokenizer: object) -> None:
    model = Model(build_network(architecture), tiny_tokenizer, architecture)  # type: ignore[arg-type]
    targets = Target("experts", ["experts"]).select(model)
    for form in DECODERS:
        with pytest.raises(BadInput, match=r"nor stored as one in files of this model type; .*; or choose .*=true"):
            check_form(form, Rtn(bits=4, scale_bits=16), targets)


def test_experts_that_round_their_inputs_are_refused(tiny_tokenizer: object, tmp_path: Path) -> None:
    model, method = mixture("mixtral", tiny_tokenizer), Fp8(activations=True)
    targets = Target("experts", ["experts"]).select(model)
    with pytest.raises(BadInput, match=r"choose compression\.activations=false; or choose .*=true"):
        check_form("compressed-tensors", method, targets)
    method.compress(model, targets)
    with pytest.raises(BadInput, match="experts that round their inputs are not saved as codes"):
        WRITERS["compressed-tensors"].write(model, tmp_path / "written")
    assert not list(tmp_path.iterdir())


def test_blocks_that_do_not_end_where_a_matrix_does_are_refused(tiny_tokenizer: object) -> None:
    targets = Target("experts", ["experts"]).select(mixture("mixtral", tiny_tokenizer))
    with pytest.raises(BadInput, match="in parts of 32, and blocks of 24 outputs do not end there"):
        check_form("compressed-tensors", Fp8(granularity="block", block_size=24), targets)
