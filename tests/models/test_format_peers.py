"""Layers as the libraries themselves write them, read here and by them; skipped where a library is not installed.

    python -m venv --system-site-packages peers
    peers/bin/pip install compressed-tensors bitsandbytes torchao "mlx[cpu]" mlx-lm nvidia-modelopt
    peers/bin/python -m pytest tests/models/test_format_peers.py

Scales are given in float32, so that the libraries' own products, which take the type of the scale, are rounded no more
than ours; of NVFP4 and MXFP4, which compressed-tensors makes bfloat16 of, ours are compared after the same rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from helpers.every_type import write_tiny
from helpers.gguf_tiny import byte_level
from helpers.networks import build_network, logits_of
from knowledge_compression.compression.base import Layerwise
from knowledge_compression.compression.methods.fp8 import Fp8
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.int8_static import Int8Static
from knowledge_compression.compression.methods.mxfp4 import Mxfp4
from knowledge_compression.compression.methods.nf4 import Nf4, levels
from knowledge_compression.compression.methods.nvfp4 import Nvfp4
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.smoothquant import SmoothQuant
from knowledge_compression.compression.solve.floats import FloatWeight, fp8, mxfp4, nvfp4
from knowledge_compression.compression.writing.writers import WRITERS
from knowledge_compression.models import Model, Target
from knowledge_compression.models.checkpoints.bitsandbytes import EightBit, FourBit
from knowledge_compression.models.checkpoints.compressed_tensors import CompressedTensors
from knowledge_compression.models.checkpoints.mlx import TYPES as CONVERTED_BY_MLX
from knowledge_compression.models.checkpoints.mlx import Mlx
from knowledge_compression.models.loading import LocalModel

SHAPE = (48, 160)


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) / 10


SCHEMES: dict[str, dict[str, Any]] = {
    **{f"packed-{b}": {"num_bits": b, "strategy": "group", "group_size": 32} for b in (2, 3, 4, 5, 6, 7, 8)},
    **{
        f"packed-{b}-zero": {"num_bits": b, "strategy": "group", "group_size": 32, "symmetric": False}
        for b in (3, 4, 8)
    },
    "packed-channel": {"num_bits": 4, "strategy": "channel"},
    "int-channel": {"num_bits": 8, "strategy": "channel", "format": "int-quantized"},
    "int-tensor": {"num_bits": 8, "strategy": "tensor", "format": "int-quantized"},
    "float-channel": {"num_bits": 8, "type": "float", "strategy": "channel", "format": "float-quantized"},
    "float-block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]}
    | {"format": "float-quantized"},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    | {"format": "nvfp4-pack-quantized"},
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    | {"format": "mxfp4-pack-quantized"},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    asked = dict(SCHEMES[name])
    layout = asked.pop("format", "pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=asked)
    library = BaseCompressor.get_value_from_registry(layout)
    state = {"weight": weight(), **scales(asked, layout)}
    stored = library.compress(state, scheme)
    theirs = library.decompress(dict(stored), scheme)["weight"].float()
    group = {"targets": ["Linear"], "weights": scheme.weights.model_dump(mode="json"), "format": layout}
    form = CompressedTensors.of({"format": layout, "config_groups": {"group_0": group}})
    ours = form.decode("layer", {f".{key}": tensor for key, tensor in stored.items() if f".{key}" in form.endings})
    assert ours.dtype == torch.float32
    wanted = ours.bfloat16().float() if "fp4" in name else ours
    assert torch.equal(wanted, theirs)


def scales(asked: dict[str, Any], layout: str) -> dict[str, torch.Tensor]:
    """Scales that fit the weight, and zero points where they are asked for."""
    table = weight()
    rows, columns = {
        "tensor": SHAPE,
        "channel": (1, SHAPE[1]),
        "block": tuple(asked.get("block_structure", (1, 1))),
    }.get(asked["strategy"], (1, asked.get("group_size", 1)))
    blocks = table.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).abs().amax((1, 3))
    largest = 6.0 if "fp4" in layout else 448.0 if asked.get("type") == "float" else 2 ** (asked["num_bits"] - 1) - 0.5
    found = {"weight_scale": blocks / largest}
    if layout.startswith("mxfp4"):
        found["weight_scale"] = 2.0 ** (found["weight_scale"].log2().floor() + 1)
    if layout.startswith("nvfp4"):
        found["weight_global_scale"] = torch.tensor([448 * 6 / float(table.abs().max())])
        found["weight_scale"] = (found["weight_scale"] * found["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    if asked["strategy"] == "tensor":
        found["weight_scale"] = found["weight_scale"].reshape(1)
    if asked.get("symmetric") is False:
        half = 2 ** (asked["num_bits"] - 1)
        zeros = torch.randint(-half, half, found["weight_scale"].shape, generator=torch.Generator().manual_seed(1))
        found["weight_zero_point"] = zeros.to(torch.int8)
    return found


SETTINGS = ["FP8_DEFAULT", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_2D_BLOCKWISE_WEIGHT_ONLY", "INT8_DEFAULT", "MXFP8_DEFAULT"]
SETTINGS += ["MXFP4_DEFAULT", "NVFP4_DEFAULT", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "INT4_BLOCKWISE_WEIGHT_ONLY"]


@pytest.mark.parametrize("name", SETTINGS)
def test_model_optimizer(name: str, tmp_path: Path) -> None:
    """What it exports reads as the weights, rounded."""
    mtq = pytest.importorskip("modelopt.torch.quantization")
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    write_tiny("llama", tmp_path / "theirs", hidden_size=256, intermediate_size=384, head_dim=64)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    mtq.quantize(theirs, getattr(mtq, f"{name}_CFG"), lambda network: network(torch.arange(4, 36)[None]))
    path = "model.layers.1.mlp.down_proj"
    dense = theirs.get_submodule(path).weight.detach().clone()
    export_hf_checkpoint(theirs, export_dir=tmp_path / "exported")
    AutoTokenizer.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "exported")
    ours = LocalModel("m", str(tmp_path / "exported")).load("cpu", "float32").network.state_dict()[f"{path}.weight"]
    # Its own rounding of small floats needs a GPU; other halves, groups or scales would be further off than 1.
    assert float((ours - dense).norm() / dense.norm()) < (0.13 if "4" in name.partition("_")[0] else 0.03)


MODES = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
MODES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


@pytest.mark.parametrize(("mode", "bits", "group"), MODES)
def test_mlx(mode: str, bits: int, group: int) -> None:
    mx = pytest.importorskip("mlx.core")
    parts = mx.quantize(mx.array(weight(2).repeat(1, 4).numpy()), group_size=group, bits=bits, mode=mode)
    theirs = np.array(mx.dequantize(*parts, group_size=group, bits=bits, mode=mode, dtype=mx.float32))
    stored = {end: torch.from_numpy(np.array(part)) for end, part in zip(Mlx.endings, parts, strict=False)}
    form = Mlx.of({"model_type": "llama", "mode": mode, "bits": bits, "group_size": group})
    assert np.allclose(form.decode("layer", stored).numpy(), theirs, rtol=0, atol=1e-6)  # MLX fuses product and sum


# Settings that mlx-lm needs, and which transformers 5 writes elsewhere or leaves out.
OLDER: dict[str, dict[str, Any]] = {
    "dots1": {"rope_scaling": None},
    "gemma4": {"vocab_size": 512, "text_config": {"global_head_dim": 16}},
    "glm4_moe": {"rope_scaling": None},
    "gpt_bigcode": {"n_inner": 256},
    "lfm2": {"block_dim": 64, "block_norm_eps": 1e-5, "full_attn_idxs": [1], "block_ff_dim": 96},
    "qwen3_moe": {"num_experts": 4},
    "qwen3_next": {"full_attention_interval": 2},
}


@pytest.mark.parametrize("model_type", sorted(CONVERTED_BY_MLX))
def test_what_mlx_lm_does_to_a_type_of_model(model_type: str, tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    wrapped = CONVERTED_BY_MLX[model_type].wrapped
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "head_dim": 16}
    write_tiny(model_type, tmp_path / "theirs", AutoModelForImageTextToText if wrapped else None, **sizes)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    rotation = config.get("rope_parameters") or {}
    flat = {name: value for name, value in rotation.items() if not isinstance(value, dict)}
    flat = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0} | flat
    config = {"head_dim": 16} | flat | config
    for name, value in OLDER.get(model_type, {}).items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    mlx_lm.convert(str(tmp_path / "theirs"), mlx_path=str(tmp_path / "floats"))
    theirs, ours = (LocalModel("m", str(tmp_path / name)).load("cpu", "float32") for name in ("theirs", "floats"))
    assert torch.allclose(logits_of(theirs), logits_of(ours), atol=1e-5 if CONVERTED_BY_MLX[model_type].raised else 0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_of_four_bits(kind: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    # Rows of whole blocks: bitsandbytes 0.50.2 decodes others wrongly on a CPU (see findings/).
    packed, state = functional.quantize_4bit(
        weight()[:, :128].contiguous(), quant_type=kind, compress_statistics=nested
    )
    tensors = {".weight": packed} | {f".weight.{key}": part for key, part in state.as_dict(packed=True).items()}
    assert set(tensors) <= set(FourBit.endings)
    assert torch.equal(FourBit().decode("layer", tensors), functional.dequantize_4bit(packed, state))


def test_bitsandbytes_of_eight_bits() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    codes, scale, _ = functional.int8_vectorwise_quant(weight().half())
    ours = EightBit().decode("layer", {".weight": codes, ".SCB": scale})
    assert torch.equal(ours, functional.int8_vectorwise_dequant(codes, scale))


def to_be_rounded() -> dict[str, torch.Tensor]:
    """Weights that a rounding can get wrong."""
    normal = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    uneven = torch.exp(6 * torch.randn(64, 16, generator=torch.Generator().manual_seed(1))).repeat_interleave(16, 1)
    some_zero = normal.clone()
    some_zero[3], some_zero[:, :64] = 0, 0
    ties = torch.randint(-24, 25, (64, 256), generator=torch.Generator().manual_seed(2)) / 4
    found = {"normal": normal / 10, "heavy": normal**5, "zeros": some_zero, "ties": ties, "uneven": normal * uneven}
    return found | {"small": normal * 1e-30, "large": normal * 1e30, "subnormal": normal * 1e-40}


ROUNDED = to_be_rounded()


def halves(weight: FloatWeight) -> torch.Tensor:
    low, high = weight.codes.unflatten(1, (-1, 2)).unbind(2)
    return low | high << 4


def theirs(weight: torch.Tensor, layout: str, blocks: torch.Tensor, **asked: Any) -> dict[str, torch.Tensor]:
    """What compressed-tensors makes of a weight with the scales that it chooses for ``blocks`` ``[..., values]``."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = QuantizationScheme(targets=["Linear"], weights={"type": "float", **asked})
    whole = generate_gparam(weight.amin(), weight.amax()) if asked["strategy"] == "tensor_group" else None
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, whole)
    state = {"weight": weight, "weight_scale": scale} | ({} if whole is None else {"weight_global_scale": whole})
    return dict(BaseCompressor.get_value_from_registry(layout).compress(state, scheme))


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_is_that_of_compressed_tensors(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    table = ROUNDED[name]
    eight = {"num_bits": 8}
    squares = torch.nn.functional.pad(table, (0, 24, 0, 16)).unflatten(1, (-1, 40)).unflatten(0, (-1, 40))
    for block, blocks, asked in (
        ((1, None), table[:, None], {"strategy": "channel"}),
        ((None, None), table.flatten(), {"strategy": "tensor"}),
        ((40, 40), squares.transpose(1, 2).flatten(2), {"strategy": "block", "block_structure": [40, 40]}),
    ):
        ours, stored = fp8(table, block), theirs(table, "float-quantized", blocks, **eight, **asked)
        assert torch.equal(ours.codes.view(torch.float8_e4m3fn).float(), stored["weight"].float())
        assert torch.equal(ours.scales.flatten(), stored["weight_scale"].flatten())
    four: dict[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    ours, stored = (
        mxfp4(table, to_even=True),
        theirs(table, "mxfp4-pack-quantized", table.unflatten(1, (-1, 32)), **four),
    )
    assert torch.equal(halves(ours), stored["weight_packed"]) and torch.equal(ours.scales, stored["weight_scale"])
    four |= {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
    ours, stored = nvfp4(table), theirs(table, "nvfp4-pack-quantized", table.unflatten(1, (-1, 16)), **four)
    assert torch.equal(halves(ours), stored["weight_packed"])
    assert torch.equal(ours.scales, stored["weight_scale"].view(torch.uint8))
    assert torch.equal(ours.whole, stored["weight_global_scale"])


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_is_that_of_torchao(name: str) -> None:
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
    from torchao.quantization import quant_primitives

    table = ROUNDED[name]
    modes = {False: ScaleCalculationMode.FLOOR, True: ScaleCalculationMode.EVEN}
    for to_even, mode in modes.items():
        ours = mxfp4(table, to_even=to_even)
        scales, codes = to_mx(table, torch.float4_e2m1fn_x2, 32, mode)
        assert torch.equal(halves(ours), codes.reshape(64, -1).view(torch.uint8))
        assert torch.equal(ours.scales, scales.view(torch.uint8))
    for block, sizes in (((1, None), [1, 256]), ((None, None), [64, 256])):
        scales = quant_primitives._choose_scale_float8(table, sizes)
        codes = quant_primitives._quantize_affine_float8(table, scales).float()
        alike = ~codes.isnan()  # a row of zeros
        assert torch.equal(fp8(table, block).codes.view(torch.float8_e4m3fn).float()[alike], codes[alike])
    if name in ("normal", "heavy", "small", "large"):  # for the others see docs/formats.md
        whole = per_tensor_amax_to_scale(table.abs().amax())
        _, codes = nvfp4_quantize(table, 16, whole)
        assert torch.equal(halves(nvfp4(table)), codes)


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_is_that_of_gguf_but_for_ties(name: str) -> None:
    quants = pytest.importorskip("gguf").quants
    table, kind = ROUNDED[name], pytest.importorskip("gguf").GGMLQuantizationType.MXFP4
    back = torch.from_numpy(np.array(quants.dequantize(quants.quantize(table.numpy(), kind), kind)))
    ours = mxfp4(table).dequantize()
    tied = (ours - table).abs() == (back - table).abs()
    assert torch.equal(ours[~tied], back[~tied])
    if name != "ties":
        assert torch.equal(ours, back)


def test_nf4_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(levels(), functional.get_4bit_type("nf4", device="cpu"))
    for name, table in ROUNDED.items():
        packed, state = functional.quantize_4bit(table, quant_type="nf4")
        alike = torch.equal(Nf4().rounded(table), functional.dequantize_4bit(packed, state))
        assert alike == (name != "subnormal"), name  # whose reciprocal scale is infinite


SAVED: dict[str, tuple[Layerwise, torch.dtype, bool]] = {
    "packed-4": (Rtn(bits=4, symmetric=True, group_size=32), torch.float32, False),
    "packed-3": (Rtn(bits=3, symmetric=True, group_size=32), torch.float32, False),
    "packed-4-zero": (Rtn(bits=4, group_size=32), torch.float32, True),
    "packed-8-zero": (Rtn(bits=8), torch.float32, True),
    "fp8": (Fp8(), torch.float32, False),
    "fp8-tensor": (Fp8(granularity="tensor"), torch.float32, False),
    "fp8-block": (Fp8(granularity="block", block_size=40), torch.float32, False),
    "mxfp4": (Mxfp4(), torch.bfloat16, False),
    "nvfp4": (Nvfp4(), torch.bfloat16, False),
    "fp8-inputs": (Fp8(activations=True), torch.float32, False),
    "fp8-block-inputs": (Fp8(granularity="block", block_size=32, activations=True), torch.float32, False),
    "mxfp4-inputs": (Mxfp4(scale="even", activations=True), torch.bfloat16, False),
}


@pytest.mark.parametrize("name", SAVED)
def test_transformers_loads_what_is_written(name: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """With compressed-tensors, in the dtypes that it multiplies in."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    method, dtype, decoded = SAVED[name]
    network = build_network("llama", hidden_size=64, intermediate_size=96, head_dim=32, tie_word_embeddings=False)
    model = Model(network, tiny_tokenizer, "llama")
    method.compress(model, Target("all", ["decoder_self_att", "ff"]).select(model))
    WRITERS["compressed-tensors"].write(model, tmp_path / "written")
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if decoded else {}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=dtype, **more).eval()
    ours = LocalModel("ours", str(tmp_path / "written")).load("cpu", str(dtype).removeprefix("torch."))
    if name.endswith("inputs"):  # which files do not make us do
        method.compress(ours, Target("all", ["decoder_self_att", "ff"]).select(ours))
    assert torch.equal(logits_of(Model(plain, tiny_tokenizer, "plain")), logits_of(ours))


EIGHT: dict[str, Any] = {
    "dynamic": Int8Dynamic("per_channel", input_steps=127.5),
    "static": Int8Static(forward_dtype="float32"),
    "smoothquant": SmoothQuant(fold=True, input_steps=127.5, forward_dtype="float32"),
}


@pytest.mark.parametrize("name", EIGHT)
def test_transformers_rounds_inputs_to_eight_bits_as_the_run_did(
    name: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """The library multiplies rounded floats, this program integers, which differ by float32 alone."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    network = build_network("llama", hidden_size=64, intermediate_size=96, head_dim=32, tie_word_embeddings=False)
    model = Model(network, tiny_tokenizer, "llama")
    windows = torch.randint(7, 90, (6, 16), generator=torch.Generator().manual_seed(2))
    EIGHT[name].compress(model, Target("all", ["decoder_self_att", "ff"]).select(model), windows)
    WRITERS["compressed-tensors"].write(model, tmp_path / "written")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.float32).eval()
    apart = (logits_of(Model(plain, tiny_tokenizer, "plain")) - logits_of(model)).abs() > 1e-5
    assert apart.float().mean() < 0.2  # tokens with an input on the edge between two codes; with other steps, all


AO = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"]
AO += ["Int8DynamicActivationIntxWeightConfig"]


@pytest.mark.parametrize("config", AO)
def test_torchao_checkpoints(config: str, tmp_path: Path) -> None:
    """What transformers saves of a model that torchao quantized reads as torchao's own floats."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, LlamaConfig, TorchAoConfig

    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 93,
    }
    AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(tmp_path / "dense")
    byte_level().save_pretrained(tmp_path / "ao")
    settings = TorchAoConfig(getattr(quantization, config)())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32, quantization_config=settings)
    theirs.save_pretrained(tmp_path / "ao")
    ours = LocalModel("local", str(tmp_path / "ao")).load("cpu", "float32").network.state_dict()
    layers = [name for name, value in theirs.state_dict().items() if hasattr(value, "dequantize") and "proj" in name]
    assert len(layers) == 7
    for name in layers:
        assert torch.equal(ours[name], theirs.state_dict()[name].dequantize()), name
