"""Networks whose answers change when texts share a pass are found by trying, and are scored text by text."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.networks import TINY, VOCABULARY, build_network, make_tokenizer
from helpers.questions import CONTINUING, random_questions
from knowledge_compression.evaluation.scoring import Scorer, ways
from knowledge_compression.evaluation.scoring.ways import FASTEST, Ways
from knowledge_compression.models import Model
from knowledge_compression.models.families import DECODER

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
# With attention in chunks, with recurrent state, or with both; their own masks and no list here say so.
UNUSUAL = {
    "llama4_text": SMALL
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
    | {"intermediate_size_mlp": 32, "num_local_experts": 2, "attention_chunk_size": 16, "num_experts_per_tok": 1},
    "mamba": SMALL | {"state_size": 4, "time_step_rank": 2},
    "falcon": SMALL | {"num_attention_heads": 4, "alibi": True},
    "bloom": SMALL | {"n_head": 4, "n_layer": 2},
}


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "_FOUND", {})


def plain(model: Model, questions: list) -> list[float]:
    """Each text alone, by the network's own forward pass."""
    found = []
    for question in questions:
        for said in question.continuations:
            ids = [*question.context, *said]
            with torch.no_grad():
                rows = model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            start = len(question.context) - 1
            found.append(sum(float(rows[start + i, token]) for i, token in enumerate(said)))
    return found


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_networks_answer_as_to_each_text_alone(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **UNUSUAL[kind])).eval()
    model = Model(network, make_tokenizer(), kind)
    questions = random_questions(5)
    scorer = Scorer(model)
    found = [one.log_prob for answers in scorer.log_likelihoods(questions) for one in answers]
    assert found == pytest.approx(plain(model, questions), abs=1e-3)
    if scorer.ways != FASTEST:
        assert "scored one text at a time" in caplog.text
    wrong = [one.log_prob for answers in _forced(model, questions) for one in answers]
    assert (wrong == pytest.approx(found, abs=1e-3)) == (scorer.ways == FASTEST)  # so it was needed where it was done


def test_an_encoder_that_ignores_padding_is_read_one_text_at_a_time(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(build_network("t5"), make_tokenizer(), "t5")
    assert Scorer(model).ways == FASTEST
    ways._FOUND.clear()
    encoder = model.network.get_encoder()
    reads = encoder.forward
    encoder.forward = lambda input_ids=None, attention_mask=None, **more: reads(input_ids=input_ids, **more)
    questions = random_questions(5)
    scorer = Scorer(model)
    assert not scorer.ways.padded and "scored one text at a time" in caplog.text
    found = [one.log_prob for answers in scorer.log_likelihoods(questions) for one in answers]
    expected = []
    for question in questions:
        for said in question.continuations:
            begun = torch.tensor([[model.decoder_start, *said[:-1]]])
            with torch.no_grad():
                logits = model.network(input_ids=torch.tensor([question.context]), decoder_input_ids=begun).logits[0]
            rows = logits.log_softmax(-1)
            expected.append(sum(float(row[token]) for row, token in zip(rows, said, strict=True)))
    assert found == pytest.approx(expected, abs=1e-3)
    wrong = [one.log_prob for answers in _forced(model, questions) for one in answers]
    assert wrong != pytest.approx(expected, abs=1e-3)  # so it was needed


def _forced(model: Model, questions: list) -> list:
    try:
        return Scorer(model, ways=FASTEST).log_likelihoods(questions)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return []


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_usual_networks_are_read_the_fastest_way(architecture: str) -> None:
    model = Model(build_network(architecture), make_tokenizer(), architecture)
    assert Scorer(model).ways == FASTEST


def test_what_was_found_holds_for_what_is_made_of_the_network() -> None:
    """A quantized network is read as it was found when it was loaded, and asked again only for another kind."""
    model = Model(build_network("llama"), make_tokenizer(), "llama")
    assert model.family == DECODER and "llama" in CONTINUING
    Scorer(model)
    (kind,) = ways._FOUND
    ways._FOUND[kind] = Ways(end_to_end=False, branching=False)
    scorer = Scorer(model)
    assert not scorer.end_to_end and not scorer.branches
