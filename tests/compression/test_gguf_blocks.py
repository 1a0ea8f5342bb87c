"""The types of GGUF as a compression, and the blocks that hold compressed layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from helpers.networks import build_network
from knowledge_compression.compression.formats.gguf_blocks import Blocks, blocks_of, encoded, kept_blocks
from knowledge_compression.compression.kept import KeptModels
from knowledge_compression.compression.methods.gguf import BITS, Gguf
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.mxfp4 import Mxfp4
from knowledge_compression.compression.methods.nvfp4 import Nvfp4
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target, TargetLayer

Kind = GGMLQuantizationType
ALL = Target("all", ["encoder_att", "decoder_self_att", "cross_att", "ff"])


def wide(tokenizer: object, architecture: str = "llama", width: int = 64) -> Model:
    changes = {"hidden_size": width, "intermediate_size": 256, "head_dim": 32} if architecture == "llama" else {}
    changes |= {"n_embd": width} if architecture == "gpt2" else {}
    return Model(build_network(architecture, **changes), tokenizer, architecture)  # type: ignore[arg-type]


def layer_of(weight: torch.Tensor) -> TargetLayer:
    network = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    network[0].weight.data.copy_(weight)
    return TargetLayer("0", "ff", network)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k in ("q2_k", "q5_k", "q8_0") else pytest.mark.slow) for k in sorted(BITS)],
)
def test_the_model_becomes_what_gguf_reads_in_the_blocks(kind: str, tiny_tokenizer: object) -> None:
    model = wide(tiny_tokenizer)
    targets = ALL.select(model)
    before = {layer.path: layer.weight.clone() for layer in targets}
    report = Gguf(kind).compress(model, targets)
    for layer, told in zip(targets, report.layers, strict=True):
        blocks = kept_blocks(layer)
        assert blocks is not None
        assert np.array_equal(layer.weight.numpy(), dequantize(blocks.data, blocks.kind))
        falls_back = kind.endswith("_k") and layer.weight.shape[1] % 256
        name = blocks.kind.name.lower()
        assert (name == kind) != bool(falls_back) and told.fallbacks == ([f"{name}_for_{kind}"] if falls_back else [])
        assert told.bits == BITS[name] and told.stored_bits == 8 * blocks.data.nbytes
        block, size = GGML_QUANT_SIZES[blocks.kind]
        assert blocks.data.nbytes == layer.parameters // block * size
        assert 0 < (layer.weight - before[layer.path]).norm() < 0.5 * before[layer.path].norm()


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"])
def test_older_types_are_gguf_s_own(kind: str) -> None:
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(encoded(weight, Kind[kind.upper()]), quantize(weight.numpy(), Kind[kind.upper()]))


@given(rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=st.integers(0, 999), size=st.sampled_from([1e-3, 1.0]))
def test_iq4_nl_is_read_by_gguf_and_rounds_no_worse_than_to_the_extreme(
    rows: int, blocks: int, seed: int, size: float
) -> None:
    weight = size * torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    weight[0, :32] *= seed % 2  # a block of zeros
    values = Blocks.of(weight, Kind.IQ4_NL).decode().reshape(-1, 32)
    levels = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
    for block, ours in zip(weight.reshape(-1, 32).numpy(), values.numpy(), strict=True):
        scale = np.float32(np.float16(block[np.abs(block).argmax()] / -127))
        nearest = (scale * levels)[np.abs(scale * levels - block[:, None]).argmin(1)]
        assert np.square(ours - block).sum() <= np.square(nearest - block).sum() * (1 + 1e-5)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([32, 64, 96, None]),
    symmetric=st.booleans(),
    seed=st.integers(0, 999),
)
def test_integers_with_aligned_groups_are_held_exactly(
    bits: int, group: int | None, symmetric: bool, seed: int
) -> None:
    """The narrowest type whose levels reach from the lowest to the highest code, minus its zero point."""
    weight = torch.randn(6, 192, generator=torch.Generator().manual_seed(seed))
    layer = layer_of(weight)
    Rtn(bits, group, symmetric, scale_bits=16).shrink(layer)
    blocks = blocks_of(layer)
    if blocks is None:
        assert bits == 8 and not symmetric  # from -255 to 255
        return
    assert torch.equal(blocks.decode(), layer.weight)
    assert blocks.kind in ({2: [Kind.Q4_0], 3: [Kind.Q4_0], 4: [Kind.Q4_0, Kind.Q5_0], 8: [Kind.Q8_0]}[bits])
    assert not (symmetric and bits == 4 and blocks.kind != Kind.Q4_0)


@pytest.mark.parametrize("scale", ["floor", "even"])
def test_mxfp4_is_held_exactly(scale: Any) -> None:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(8, 128, generator=generator) * 10.0 ** torch.randint(-6, 3, (8, 1), generator=generator)
    weight[1] = 0
    layer = layer_of(weight)
    Mxfp4(scale).shrink(layer)
    blocks = blocks_of(layer)
    assert blocks is not None and blocks.kind == Kind.MXFP4 and torch.equal(blocks.decode(), layer.weight)
    Nvfp4().shrink(layer)
    assert blocks_of(layer) is None  # scales of another kind


def test_what_gguf_has_no_blocks_for_is_not_held() -> None:
    weight = torch.randn(6, 192, generator=torch.Generator().manual_seed(1))
    for method in (Rtn(4, 48, scale_bits=16), Rtn(4, 32, scale_bits=32), Rtn(4, 16, scale_bits=16)):
        layer = layer_of(weight)
        method.shrink(layer)
        assert blocks_of(layer) is None
    layer = layer_of(weight)
    assert blocks_of(layer) is None
    Gguf("q8_0").shrink(layer)
    assert blocks_of(layer) is not None
    layer.weight[0, 0] += 1
    assert blocks_of(layer) is None  # it has changed since


def test_gptq_codes_are_held_exactly(tiny_tokenizer: object) -> None:
    for architecture in ("llama", "gpt2"):
        model = wide(tiny_tokenizer, architecture)
        targets = ALL.select(model)
        windows = torch.randint(7, 60, (4, 16), generator=torch.Generator().manual_seed(3))
        Gptq(bits=4, group_size=32, symmetric=True).compress(model, targets, windows)  # type: ignore[arg-type]
        for layer in targets:
            blocks = blocks_of(layer)
            assert blocks is not None and blocks.kind == Kind.Q4_0 and torch.equal(blocks.decode(), layer.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_models_keep_their_blocks(dtype: torch.dtype) -> None:
    layer = layer_of(torch.randn(4, 256, generator=torch.Generator().manual_seed(4)).to(dtype))
    Gguf("q4_k").shrink(layer)
    blocks = kept_blocks(layer)
    assert blocks is not None and torch.equal(blocks.decode().to(dtype), layer.weight)


def test_the_cache_keeps_the_blocks(tiny_tokenizer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    method, seen = Gguf("q4_k"), []
    for _ in range(2):
        model = wide(tiny_tokenizer)
        targets = ALL.select(model)

        def compress(model: Model = model, targets: object = targets) -> object:
            return method.compress(model, targets)  # type: ignore[arg-type]

        make: Callable[[], object] = compress
        _, found = KeptModels(1.0).compress("key", model, targets, method, make, afresh=False)  # type: ignore[arg-type]
        seen.append((found, {layer.path: blocks_of(layer) for layer in targets}))
    (_, first), (found, second) = seen
    assert found
    for path, blocks in first.items():
        assert blocks.kind == second[path].kind and np.array_equal(blocks.data, second[path].data)


def test_bad_settings_are_one_line(tiny_model: Callable[[str], Model]) -> None:
    with pytest.raises(BadInput, match=r"compression.type=q4_m is not offered; choose one of iq4_nl, .*q8_0"):
        Gguf("q4_m")
    model = tiny_model("llama")  # of width 16
    with pytest.raises(BadInput, match=r"stores 32 neighbouring inputs together, and .*q_proj has 16"):
        Gguf("q4_k").compress(model, ALL.select(model))
