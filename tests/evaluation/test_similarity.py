"""Similarity to the dense model: one where nothing changed, and where the change was made otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.similarity import Similarity, observe
from knowledge_compression.recovery.bank import bank_of
from knowledge_compression.recovery.prompted_network import Prompted


@pytest.fixture
def suite(tmp_path):
    folder = Path(tmp_path, "wikitext2")
    folder.mkdir()
    words = "the capital of france is paris and the capital of italy is rome . a dog is an animal . "
    for split in ("train", "validation", "test"):
        (folder / f"{split}.raw.txt").write_text(words * 40)
    return Similarity(windows=3, length=20, data_dir=str(tmp_path))


def compared(tiny_model, architecture):
    return Scorer(tiny_model(architecture), original=lambda: tiny_model(architecture))


@pytest.mark.parametrize(
    "architecture", ["llama", "opt", "gpt2", "gpt_neox", "gemma3_text", "bert", "albert", "t5", "bart"]
)
def test_an_unchanged_model_is_its_own_like(tiny_model, suite, architecture):
    found = suite.evaluate(compared(tiny_model, architecture))
    stacks = 2 if architecture in ("t5", "bart") else 1
    assert found.items.filter(task="activation").height == 3 * 2 * stacks if architecture != "albert" else True
    assert found.items.filter(task="attention").height >= 3 * 2 * stacks  # three windows
    assert found.metrics["attention"] == pytest.approx(1.0, abs=1e-5)
    assert found.metrics["activation"] == pytest.approx(1.0, abs=1e-5)


def test_a_change_shows_where_it_was_made_and_after(tiny_model, suite):
    scorer = compared(tiny_model, "llama")
    with torch.no_grad():
        scorer.model.network.model.layers[1].self_attn.q_proj.weight.neg_()
    metrics = suite.evaluate(scorer).metrics
    assert metrics["attention.0"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["activation.0"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["attention.1"] < 0.999 and metrics["activation.1"] < 0.9999


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_observed_attention_is_that_of_the_eager_model(tiny_model, architecture):
    model = tiny_model(architecture)
    ids = torch.arange(7, 22)[None]
    seen = observe(model, ids)
    model.network.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model.network(input_ids=ids, output_attentions=True, output_hidden_states=True)
    ours = [rows for (kind, _), rows in seen.items() if kind == "attention"]
    for mine, theirs in zip(ours, eager.attentions, strict=True):
        assert (mine - theirs.flatten(0, -2)).abs().max() < 1e-6


def test_prompts_change_attention_and_leave_the_answer_as_it_was(tiny_model, suite):
    model = tiny_model("llama")
    torch.manual_seed(0)
    prompted = Prompted(model, bank_of(model, [torch.randn(4, 16), torch.randn(6, 16)]))
    ids = torch.arange(7, 22)[None]
    with torch.no_grad():
        before = model.network(input_ids=ids).logits
        scorer = Scorer(model, prompts=prompted.prompts, original=lambda: tiny_model("llama"))
        metrics = suite.evaluate(scorer).metrics
        assert torch.equal(model.network(input_ids=ids).logits, before)
    assert 0 < metrics["activation"] < 0.9999
    assert metrics["attention.0"] == pytest.approx(
        1.0, abs=1e-4
    )  # the first layer's queries and keys are the input's own
    assert metrics["attention.1"] < 0.99999


def test_what_cannot_be_compared_says_so(tiny_model, suite):
    with pytest.raises(BadInput, match="which cannot be loaded here"):
        suite.evaluate(Scorer(tiny_model("llama")))
    with pytest.raises(BadInput, match=r"eval\.similarity.corpus=books does not exist; choose one of wikitext, c4"):
        Similarity(corpus="books")


def test_the_fingerprint_is_of_the_text_that_is_read(suite):
    first = suite.fingerprint()
    (Path(suite.data_dir) / "wikitext2" / "train.raw.txt").write_text("another text to tune on")
    assert suite.fingerprint() == first
    (Path(suite.data_dir) / "wikitext2" / "test.raw.txt").write_text("another text to read " * 40)
    assert suite.fingerprint() != first
