"""Layers as the libraries themselves write them, read here and by them; skipped where a library is not installed.

    python -m venv --system-site-packages peers && peers/bin/pip install compressed-tensors bitsandbytes
    peers/bin/python -m pytest tests/test_format_peers.py

Scales are given in float32, so that the libraries' own products, which take the type of the scale, are rounded no more
than ours; of NVFP4 and MXFP4, which compressed-tensors makes bfloat16 of, ours are compared after the same rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from knowledge_compression.models.checkpoints.bitsandbytes import EightBit, FourBit
from knowledge_compression.models.checkpoints.compressed_tensors import CompressedTensors

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
