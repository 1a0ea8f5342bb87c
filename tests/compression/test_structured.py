"""Structured pruning is torch's ln_structured, on every architecture."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.utils import prune as torch_prune

from helpers.networks import logits_of
from knowledge_compression.compression.methods.structured import Structured
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target, Targets

ALL = ["encoder_att", "decoder_self_att", "cross_att", "ff", "transform", "final"]


def select(model: Model, *roles: str) -> Targets:
    return Target("test", list(roles)).select(model)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.8])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("norm", ["1", "2", "inf"])
def test_it_is_torchs_ln_structured(tiny_model: Callable[[str], Model], sparsity: float, dim: int, norm: str) -> None:
    for architecture in ("bert", "opt", "gpt2"):
        model, reference = tiny_model(architecture), tiny_model(architecture)
        reference.untie_head()
        targets = select(model, *ALL) if architecture != "gpt2" else select(model, "ff", "final")
        report = Structured(sparsity, dim, norm).compress(model, targets, None)
        removed = 0
        for ours, theirs in zip(targets, [_same(reference, layer.path) for layer in targets], strict=True):
            module = theirs.module
            turned = ours.weight is not ours.module.weight.data and ours.weight.shape != ours.module.weight.shape
            torch_prune.ln_structured(module, "weight", sparsity, float(norm), 1 - dim if turned else dim)
            assert torch.equal(ours.module.weight, module.weight)
            removed += int((module.weight_mask == 0).sum())
        assert report.removed == removed


def _same(reference: Model, path: str):
    return next(layer for layer in select(reference, *ALL, "decoder_self_att") if layer.path == path)


def test_rows_of_the_final_layer_are_words_and_the_embeddings_stay(any_tiny_model: Model) -> None:
    model = any_tiny_model
    embeddings = model.network.get_input_embeddings().weight.detach().clone()
    targets = select(model, "final")
    report = Structured(0.5).compress(model, targets, None)
    model.network.tie_weights()
    rows = (targets[0].weight == 0).all(1)
    assert int(rows.sum()) == round(0.5 * len(rows)) and report.removed == int(rows.sum()) * targets[0].weight.shape[1]
    assert torch.equal(model.network.get_input_embeddings().weight, embeddings)
    assert logits_of(model).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"sparsity": 1.0}, r"sparsity=1.0 .*\[0, 1\)"),
        ({"sparsity": 0.2, "dim": 2}, "dim=2 does not exist; choose 0 .* or 1"),
        ({"sparsity": 0.2, "norm": "0"}, "norm=0 does not exist; choose one of 1, 2, inf"),
    ],
)
def test_bad_settings_get_one_line(tiny_model: Callable[[str], Model], settings: dict, line: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(BadInput, match=line):
        Structured(**settings).compress(model, select(model, "ff"), None)
