"""Scoring in another floating type than the model's own, and how a device's types are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers.experiments import SUITE, made
from helpers.networks import FAMILY, TINY
from helpers.questions import CONTINUING, random_questions
from helpers.recoveries import STRATEGIES
from helpers.stores import bits, made_run
from knowledge_compression.analysis.comparisons import compare
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.harness import Harness
from knowledge_compression.evaluation.scoring import Blank, Question, Scorer
from knowledge_compression.models import Model, Target, device
from knowledge_compression.models.device import Device, measured_bfloat16_gain, multiplied_in, processor
from knowledge_compression.models.families import ENCODER
from knowledge_compression.models.prompts import NO_PROMPTS, Prompts
from knowledge_compression.results.store import RunStore
from knowledge_compression.results.tracker import NoTracker

CPU = torch.device("cpu")
ENCODERS = [name for name in TINY if FAMILY[name] == ENCODER]


def close_but_not_equal(model: Model, questions: list[Question], prompts: Prompts = NO_PROMPTS) -> None:
    """bfloat16 has 8 bits, so log-probabilities move by some hundredths, and no weight moves at all."""
    weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    exact, found = (
        [answer.log_prob for answers in scorer.log_likelihoods(questions) for answer in answers]
        for scorer in (Scorer(model, prompts=prompts), Scorer(model, prompts=prompts, dtype=torch.bfloat16))
    )
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
    found = torch.cat([rows for _, rows in Scorer(model, dtype=torch.bfloat16).distributions(blanks)])
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recovered_models_in_bfloat16(tiny_model, text, strategy) -> None:
    model = tiny_model("llama")
    prompts = STRATEGIES[strategy].recover(model, text).prompts
    close_but_not_equal(model, [Question([7, 8, 9, 10], [[11, 12], [13], [14, 15, 16]])], prompts)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_int8_layers_in_bfloat16(tiny_model: Callable[[str], Model], granularity: str) -> None:
    model = tiny_model("llama")
    Int8Dynamic(granularity).compress(model, Target("ff", ["ff"]).select(model), None)
    close_but_not_equal(model, random_questions(32))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_generation_multiplies_in_it(tiny_model: Callable[[str], Model], dtype: torch.dtype | None) -> None:
    model, types = tiny_model("llama"), set()
    model.network.lm_head.register_forward_hook(lambda _, __, logits: types.add(logits.dtype))
    assert all(
        len(said) == 5 for said in Scorer(model, dtype=dtype).generate([[7, 8, 9], [10, 11]], 5, lambda *_: False)
    )
    assert types == {dtype or torch.float32}


def test_stock_scoring_multiplies_in_it_too(tiny_model: Callable[[str], Model], tasks_dir: Path) -> None:
    model = tiny_model("llama")

    def log_probs(scoring: str, dtype: torch.dtype | None = torch.bfloat16) -> list[float]:
        suite = Harness(tasks=["boolq"], data_dir=str(tasks_dir), scoring=scoring)
        return suite.evaluate(Scorer(model, dtype=dtype)).items["log_prob"].to_list()

    exact, stock = log_probs("stock", None), log_probs("stock")
    assert stock != exact
    assert stock == pytest.approx(exact, rel=0.03, abs=0.05) == log_probs("fast")


@pytest.mark.parametrize(("dtype", "scored_in"), [("float32", "torch.bfloat16"), ("float16", None)])
def test_a_run_tells_what_it_was_scored_in(
    tiny_folder: Path, tmp_path: Path, dtype: str, scored_in: str | None
) -> None:
    experiment = replace(made(tiny_folder, {"a": SUITE}), scoring_dtype="bfloat16", dtype=dtype)
    run = experiment.run(RunStore(tmp_path), NoTracker())
    assert run.environment["scored_in"] == scored_in  # narrower types than float32 stay


def test_runs_scored_in_another_type_are_never_compared() -> None:
    dense, small = made_run(bits("1100"), compression="none"), made_run(bits("1000"))
    assert [len(group.runs) for group in compare([dense, small])] == [1]
    small.environment["scored_in"] = "torch.bfloat16"
    assert [len(group.runs) for group in compare([dense, small])] == [0]


def test_one_rule_settles_every_type_of_products() -> None:
    settle = partial(Device.product_dtype, setting="scoring_dtype")
    for gain, chosen in ((0.6, None), (1.1, None), (2.0, torch.bfloat16)):
        assert settle(Device(CPU, bfloat16_gain=gain), "auto", torch.float32) is chosen
    slow, fast = Device(CPU, bfloat16_gain=0.5), Device(CPU, bfloat16_gain=4.0)
    assert settle(slow, "bfloat16", torch.float32) is torch.bfloat16
    for choice in ("float32", "model"):
        assert settle(fast, choice, torch.float32) is None
    for stored in (torch.float16, torch.bfloat16):  # narrower networks stay as they are
        assert settle(fast, "auto", stored) is settle(fast, "bfloat16", stored) is None
    with pytest.raises(BadInput, match="scoring_dtype=float8 does not exist; choose one of auto, bfloat16, float32"):
        settle(fast, "float8", torch.float32)


def test_a_device_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(device, "_SIDE", 128)  # bfloat16 may take seconds
    here = Device(CPU)
    gain = measured_bfloat16_gain(here)
    assert gain > 0
    monkeypatch.setattr(device, "products_a_second", lambda *_: pytest.fail("measured again"))
    assert measured_bfloat16_gain(here) == gain
    assert here.multiplies_bfloat16_faster == (gain > 1.25)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_networks_multiply_in_their_own_type_without_a_warning(dtype: torch.dtype | None) -> None:
    with multiplied_in(dtype, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_processors_are_told_apart() -> None:
    assert processor()
    assert "cpu MHz" not in processor()  # which changes from moment to moment
