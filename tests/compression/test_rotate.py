"""Rotation of the residual stream: Hadamard matrices, equal logits, and one line where it cannot be done."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.layers import EVERYTHING, windows
from helpers.networks import MIXTURES, TINY, logits_of
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.rotate import Rotate
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.solve.hadamard import hadamard
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model

TURNS = ("llama", "mistral", "qwen2", "t5", "mixtral", "qwen3_moe", "granitemoe")


def with_uneven_norms(model: Model) -> Model:
    """Fresh norms and biases do nothing; these do."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def test_hadamard_matrices_are_orthogonal() -> None:
    built = [size for size in range(1, 90) if hadamard(size) is not None]
    for size in [*built, 576]:
        matrix = hadamard(size).astype(np.float32)
        assert np.array_equal(matrix @ matrix.T, size * np.eye(size)) and (np.abs(matrix) == 1).all()
    assert {1, 2, 4, 12, 20, 28, 36, 40, 72} <= set(built)
    assert not {3, 6, 9, 10, 54} & set(built)


@pytest.mark.parametrize("architecture", TURNS)
def test_logits_stay_and_weights_do_not(tiny_model, architecture: str) -> None:
    model = with_uneven_norms(tiny_model(architecture))
    before, weights = logits_of(model), {x.path: x.weight.clone() for x in EVERYTHING.select(model)}
    tied = model.head_is_tied
    parameters = model.parameter_count()
    report = Rotate(seed=3).compress(model, EVERYTHING.select(model))
    assert (logits_of(model) - before).abs().max() < 1e-4
    reading_heads = {"q_norm", "k_norm"}  # of a head's width, not the stream's
    assert not reading_heads & {path.rpartition(".")[2] for path in weights}
    for layer in EVERYTHING.select(model):
        assert not torch.allclose(layer.weight, weights[layer.path], atol=1e-3), layer.path
    assert not model.head_is_tied
    assert report.model_parameters == model.parameter_count() == parameters + tied * len(before[0, 0]) * 16


@pytest.mark.parametrize("architecture", sorted({*TINY, *MIXTURES} - {*TURNS}))
def test_what_cannot_be_turned_is_one_line_and_left_as_it_was(tiny_model, architecture: str) -> None:
    model = with_uneven_norms(tiny_model(architecture))
    before = {name: values.clone() for name, values in model.network.state_dict().items()}
    with pytest.raises(BadInput, match=r"^compression=rotate cannot rotate the residual stream of tiny-\S+.*$"):
        Rotate().compress(model, EVERYTHING.select(model))
    for name, values in model.network.state_dict().items():
        assert torch.equal(values, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "t5", "mixtral"])
def test_narrower_weights_are_turned_in_float32_and_rounded_once(
    tiny_model, architecture: str, dtype: torch.dtype
) -> None:
    """As a GPU loads them by default."""
    model, wide = (with_uneven_norms(tiny_model(architecture)) for _ in range(2))
    model.network.to(dtype)
    wide.network.load_state_dict(model.network.state_dict())
    for one in (model, wide):
        Rotate(seed=3).compress(one, EVERYTHING.select(one))
    turned = wide.network.state_dict()
    for name, values in model.network.state_dict().items():
        torch.testing.assert_close(values, turned[name].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_narrower_weights_that_cannot_be_turned_are_left_as_they_were(tiny_model) -> None:
    model = tiny_model("gpt_oss")
    model.network.to(torch.bfloat16)
    before = {name: values.clone() for name, values in model.network.state_dict().items()}
    with pytest.raises(BadInput, match="its answers would not stay the same"):
        Rotate().compress(model, EVERYTHING.select(model))
    for name, values in model.network.state_dict().items():
        assert torch.equal(values, before[name]), name


def test_a_width_without_a_hadamard_matrix_is_one_line() -> None:
    with pytest.raises(BadInput, match="no Hadamard matrix for the 18 channels of small; it needs a multiple of 4"):
        Rotate().matrix(18, "small")


def test_the_matrix_is_orthogonal_and_follows_the_seed() -> None:
    one, other = Rotate(seed=0).matrix(48, "small"), Rotate(seed=1).matrix(48, "small")
    torch.testing.assert_close(one @ one.T, torch.eye(48).double())
    assert torch.equal(one, Rotate(seed=0).matrix(48, "small")) and not torch.equal(one, other)


def test_outlying_channels_cost_less_bits_after_it(tiny_model) -> None:
    def damage(method) -> float:
        model = tiny_model("llama")
        with torch.no_grad():  # a channel of the stream that stands out, as in trained models
            for layer in EVERYTHING.select(model):
                if layer.weight.shape[1] == 16:
                    layer.weight[:, 5] *= 30
            for name, parameter in model.network.named_parameters():
                if name.endswith("layernorm.weight"):
                    parameter[5] /= 30
        before = logits_of(model)
        method.compress(model, EVERYTHING.select(model), windows())
        return float((logits_of(model) - before).square().mean())

    assert damage(Rotate(then=Rtn(4))) < 0.5 * damage(Rtn(4))
    assert damage(Rotate(then=Gptq(4))) < damage(Rotate(then=Rtn(4)))
