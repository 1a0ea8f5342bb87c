"""llama.cpp's mixtures of types, and rounding by the importance of inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType, dequantize

from helpers.gguf_files import TOKENS
from helpers.gguf_tiny import tiny
from helpers.networks import build_network
from knowledge_compression.compression.formats.gguf import save_gguf
from knowledge_compression.compression.formats.gguf_blocks import encoded, kept_blocks
from knowledge_compression.compression.methods.gguf import Gguf
from knowledge_compression.compression.methods.imatrix import Imatrix
from knowledge_compression.compression.solve.mixtures import Mixed
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target

Kind = GGMLQuantizationType
ALL = Target("all", ["encoder_att", "decoder_self_att", "ff", "experts"])
LLAMA, FALCON, MIXTRAL = Mixed(17, 2), Mixed(18, 4, falcon=True), Mixed(9, 2, experts=8)
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}


@pytest.mark.parametrize(
    ("model", "mixture", "tensor", "wanted"),
    [
        (LLAMA, "q4_k_m", "attn_v", "66446446446446666"),
        (LLAMA, "q4_k_m", "ffn_down", "66446446446446666"),
        (LLAMA, "q4_k_m", "attn_output", "4" * 17),
        (LLAMA, "q5_k_m", "ffn_down", "66556556556556666"),
        (LLAMA, "q4_k_s", "attn_v", "55554444444444444"),
        (LLAMA, "q4_k_s", "ffn_down", "55444444444444444"),
        (LLAMA, "q3_k_m", "attn_v", "55444444444444444"),
        (LLAMA, "q3_k_m", "ffn_down", "54444444444444444"),
        (LLAMA, "q3_k_m", "ffn_up", "3" * 17),
        (LLAMA, "q2_k_mixed", "attn_v", "3" * 17),
        (Mixed(17, 4), "q2_k_mixed", "attn_v", "4" * 17),
        (FALCON, "q4_k_m", "attn_qkv", "664464464464464666"),
        (FALCON, "q4_k_m", "ffn_down", "654454454454454555"),
        (MIXTRAL, "q4_k_m", "attn_k", "8" * 9),
        (MIXTRAL, "q4_k_m", "attn_output", "5" * 9),
        (MIXTRAL, "q4_k_m", "ffn_down_exps", "644644666"),
    ],
)
def test_the_types_are_those_that_llama_cpp_gives(model: Mixed, mixture: str, tensor: str, wanted: str) -> None:
    """As ``llama_model_quantize`` of llama-cpp-python 0.3.36 wrote them (experiments/gguf_conversion/mixtures.py)."""
    found = [model.type_of(mixture, f"blk.{block}.{tensor}.weight", block) for block in range(model.blocks)]
    assert "".join(kind[1] for kind in found) == wanted


def test_a_file_holds_the_mixture_that_was_evaluated(tmp_path: Path) -> None:
    model = tiny("llama", **WIDE)
    targets = ALL.select(model)
    report = Gguf("q4_k_m").compress(model, targets)
    bits = {layer.path.rpartition(".")[2]: layer.bits for layer in report.layers if ".1." in layer.path}
    assert bits == dict.fromkeys(["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj"], 4) | {
        "v_proj": 6,
        "down_proj": 6,
    }
    weights = [layer.weight.clone() for layer in targets]
    save_gguf(model, tmp_path / "model", "q4_k_m")
    reader = GGUFReader(tmp_path / "model" / "model.gguf")
    assert reader.fields["general.file_type"].contents() == LlamaFileType.MOSTLY_Q4_K_M
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert kinds["output.weight"] == Kind.Q6_K and kinds["token_embd.weight"] == Kind.Q4_K
    assert kinds["blk.1.attn_v.weight"] == kinds["blk.1.ffn_down.weight"] == Kind.Q6_K
    assert kinds["blk.1.attn_q.weight"] == Kind.Q4_K and kinds["blk.1.attn_norm.weight"] == Kind.F32
    stored = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert np.array_equal(stored["blk.1.ffn_down.weight"], weights[-1].numpy())  # not rounded again


def test_a_mixture_needs_llama_cpps_names(tiny_tokenizer: Any) -> None:
    model = Model(build_network("bert"), tiny_tokenizer, "bert")
    with pytest.raises(BadInput, match=r"llama\.cpp has none for bert; choose a single type") as told:
        Gguf("q4_k_m").compress(model, Target("all", ["encoder_att", "ff"]).select(model))
    assert "\n" not in str(told.value)
    with pytest.raises(BadInput, match=r"compression.type=q4_k_l is not offered; choose one of .*q4_k_m"):
        Gguf("q4_k_l")


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"])
def test_important_inputs_are_rounded_with_more_care(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 512, generator=generator)
    importance = torch.rand(512, generator=generator) ** 8

    def loss(of: torch.Tensor | None) -> float:
        values = torch.from_numpy(dequantize(encoded(weight, Kind[kind], of), Kind[kind]))
        return float((importance * (values - weight).square()).sum())

    assert loss(importance) < 0.9 * loss(None)
    alike = dequantize(encoded(weight, Kind[kind], torch.ones(512)), Kind[kind])
    plain = dequantize(encoded(weight, Kind[kind]), Kind[kind])
    assert np.square(alike - weight.numpy()).sum() <= 1.001 * np.square(plain - weight.numpy()).sum()
    nothing = dequantize(encoded(torch.zeros(2, 512), Kind[kind], importance), Kind[kind])
    assert not nothing.any()


def test_outputs_on_the_text_are_nearer_with_importance() -> None:
    errors = {}
    windows: Any = torch.randint(3, len(TOKENS), (8, 32), generator=torch.Generator().manual_seed(0))
    for method in (Gguf("q3_k_m"), Imatrix(type="q3_k_m", forward_dtype="float32")):
        model = tiny("llama", **WIDE)
        with torch.no_grad():
            model.network.model.embed_tokens.weight[:, :32] *= 20  # a few inputs matter more than the others
            dense = model.network(windows).logits
            report = method.compress(model, ALL.select(model), windows if method.calibrated else None)
            errors[method.name] = float((model.network(windows).logits - dense).square().mean())
        assert [layer.bits for layer in report.layers] and all(kept_blocks(one) for one in ALL.select(model))
    assert errors["imatrix"] < errors["gguf"]
