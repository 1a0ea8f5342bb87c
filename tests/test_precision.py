"""Scoring in another floating type than the model's own, and how a device's types are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_recovery import STRATEGIES, text  # noqa: F401  (a fixture)
from test_scoring import CONTINUING, random_questions

from knowledge_compression.compression.int8_dynamic import Int8Dynamic
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.scoring import Blank, Question, Scorer
from knowledge_compression.models import Model, Target, precision
from knowledge_compression.models.families import ARCHITECTURES, ENCODER
from knowledge_compression.models.precision import bfloat16_gain, processor, resolve_scoring_dtype

CPU = torch.device("cpu")
ENCODERS = [name for name in TINY if ARCHITECTURES[name].family == ENCODER]


def close_but_not_equal(model: Model, questions: list[Question]) -> None:
    """bfloat16 has 8 bits, so log-probabilities move by some hundredths, and no weight moves at all."""
    weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    exact = [answer.log_prob for answers in Scorer(model).log_likelihoods(questions) for answer in answers]
    model.scored_in = torch.bfloat16
    found = [answer.log_prob for answers in Scorer(model).log_likelihoods(questions) for answer in answers]
    assert found != exact
    assert found == pytest.approx(exact, rel=0.03, abs=0.05)
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("architecture", CONTINUING)
def test_continuations_in_bfloat16(tiny_model: Callable[[str], Model], architecture: str) -> None:
    close_but_not_equal(tiny_model(architecture), random_questions(31))


@pytest.mark.parametrize("architecture", ENCODERS)
def test_blanks_in_bfloat16(tiny_model: Callable[[str], Model], architecture: str) -> None:
    model = tiny_model(architecture)
    blanks = [Blank([2, *range(7, 7 + n), 4, 3], n + 1) for n in range(1, 12)]
    exact = torch.cat([rows for _, rows in Scorer(model).distributions(blanks)])
    model.scored_in = torch.bfloat16
    found = torch.cat([rows for _, rows in Scorer(model).distributions(blanks)])
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recovered_models_in_bfloat16(tiny_model, text, strategy) -> None:  # noqa: F811
    model = tiny_model("llama")
    STRATEGIES[strategy].recover(model, text)
    close_but_not_equal(model, [Question([7, 8, 9, 10], [[11, 12], [13], [14, 15, 16]])])


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_int8_layers_in_bfloat16(tiny_model: Callable[[str], Model], granularity: str) -> None:
    model = tiny_model("llama")
    Int8Dynamic(granularity).compress(model, Target("ff", ["ff"]).select(model), None)
    close_but_not_equal(model, random_questions(32))


def test_generation_in_bfloat16_is_that_of_autocast(tiny_model: Callable[[str], Model]) -> None:
    model = tiny_model("llama")
    prompts = [[7, 8, 9], [10, 11, 12, 13, 14]]
    with torch.autocast("cpu", torch.bfloat16):
        expected = Scorer(model).generate(prompts, 5, lambda _: False)
    model.scored_in = torch.bfloat16
    assert Scorer(model).generate(prompts, 5, lambda _: False) == expected


def test_auto_takes_bfloat16_where_it_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for gain, chosen in ((0.6, None), (1.1, None), (2.0, torch.bfloat16)):
        monkeypatch.setattr(precision, "bfloat16_gain", lambda _, gain=gain: gain)
        assert resolve_scoring_dtype("auto", CPU) is chosen
    assert resolve_scoring_dtype("model", CPU) is None
    assert resolve_scoring_dtype("bfloat16", CPU) is torch.bfloat16
    with pytest.raises(BadInput, match="choose one of model, auto, bfloat16"):
        resolve_scoring_dtype("float8", CPU)


def test_a_device_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path))
    bfloat16_gain.cache_clear()
    gain = bfloat16_gain(CPU)
    assert gain > 0
    bfloat16_gain.cache_clear()
    monkeypatch.setattr(precision, "_measured_gain", lambda _: pytest.fail("measured again"))
    assert bfloat16_gain(CPU) == gain
    bfloat16_gain.cache_clear()


def test_processors_are_told_apart() -> None:
    assert processor()
    assert "cpu MHz" not in processor()  # which changes from moment to moment
