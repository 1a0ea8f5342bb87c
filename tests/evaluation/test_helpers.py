"""Questions shared among processes: the same answers as from one, whatever happens to the others."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.experiments import SUITE, made
from helpers.questions import random_questions
from knowledge_compression.building import build
from knowledge_compression.configuration import Doing
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.harness import Harness
from knowledge_compression.evaluation.scoring import Blank, Question, Scorer
from knowledge_compression.evaluation.scoring.handing import handed_over, packed, taken_over, unpacked
from knowledge_compression.evaluation.scoring.helpers import Helpers
from knowledge_compression.evaluation.scoring.reader import Reader, Request
from knowledge_compression.models import Model, device
from knowledge_compression.models.device import check_processes
from knowledge_compression.models.families import ENCODER
from knowledge_compression.models.prompts import Prompts
from knowledge_compression.models.spread import Spread
from knowledge_compression.recovery.bank import bank_of
from knowledge_compression.recovery.joined import join_prompt
from knowledge_compression.recovery.prompted_network import Prompted

CPU = torch.device("cpu")
SMALL = 40  # tokens in a pass, so that there are many


def passed_on(reader: Reader) -> Reader:
    """The reader as a helper gets it."""
    data, file = handed_over(reader.light())
    with file:
        other = taken_over(data, file.fileno(), CPU)
    assert isinstance(other, Reader)
    return other


def answers(reader: Reader, model: Model) -> Any:
    if model.family == ENCODER:
        asked = [Blank([5, 6, 7, 8, 9], position=2), Blank([9, 8, 7], position=0)]
        (*_, found), *rest = reader.read(Request("blanks", asked))
        assert not rest
        return found.logits.tolist()
    scorer = Scorer(model, prompts=reader.prompts)
    scorer.reader = reader
    return scorer.log_likelihoods(random_questions(3, count=4))


def test_a_reader_that_was_handed_over_says_the_same_to_the_bit(any_tiny_model: Model) -> None:
    reader = Scorer(any_tiny_model).reader
    other = passed_on(reader)
    assert other.model.network is not any_tiny_model.network
    assert answers(other, other.model) == answers(reader, any_tiny_model)
    tied = [any_tiny_model.head_is_tied, other.model.head_is_tied]
    assert tied[0] == tied[1]


@pytest.mark.parametrize("lengths", [(3,), (3, 4)])
def test_prompts_are_handed_over_with_their_network(
    tiny_model: Callable[[str], Model], lengths: tuple[int, ...]
) -> None:
    model = tiny_model("llama")
    torch.manual_seed(0)
    width = model.text_config.hidden_size
    prompted = Prompted(model, bank_of(model, [torch.randn(length, width) for length in lengths]))
    reader = Scorer(model, prompts=prompted.prompts).reader
    other = passed_on(reader)
    assert answers(other, other.model) == answers(reader, model)


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_a_prompt_read_with_the_input_is_handed_over(tiny_model: Callable[[str], Model], architecture: str) -> None:
    model = tiny_model(architecture)
    torch.manual_seed(0)
    Scorer(model)  # finds out how texts may share a pass, while there is no prompt
    join_prompt(model, torch.randn(3, model.text_config.hidden_size))
    reader = Scorer(model, prompts=Prompts(3)).reader
    other = passed_on(reader)
    assert answers(other, other.model) == answers(reader, model)


def test_tensors_of_every_shape_arrive_and_named_objects_are_not_sent() -> None:
    tensors = [torch.tensor(3.0), torch.zeros(0, 4), torch.arange(6).view(2, 3).T, torch.ones(2).bool()]
    tensors.append(torch.randn(3).to(torch.bfloat16))
    name = object()
    found, same = unpacked(packed((tensors, name), {"it": name}), {"it": name})
    assert same is name
    for a, b in zip(found, tensors, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    weight = torch.nn.Parameter(torch.randn(4, 4), requires_grad=False)
    data, file = handed_over([weight, weight, weight.detach()[1:, ::2], torch.zeros(0)])
    with file:
        one, other, part, empty = taken_over(data, file.fileno(), CPU)
    assert one is other and isinstance(one, torch.nn.Parameter) and not one.requires_grad
    assert torch.equal(one, weight) and torch.equal(part, weight[1:, ::2]) and empty.shape == (0,)
    assert part.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        handed_over(lambda: None)


@dataclass(frozen=True)
class LongEnough:
    most: int

    def __call__(self, said: Any) -> bool:
        return len(said) >= self.most


class Watching:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def saw(self, positions: Any, states: torch.Tensor, logits: torch.Tensor) -> None:
        self.told.append(([(one.key, one.gold) for one in positions], states.tolist(), logits.tolist()))


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Model, Helpers]]:
    """A model and a helper that is ready to read with it."""
    from helpers.networks import build_network, make_tokenizer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as each of two processes has
    model = Model(build_network("llama"), make_tokenizer(), "tiny")
    with Helpers(2) as helpers:
        helpers.start(Scorer(model).reader)
        yield model, helpers
    torch.set_num_threads(threads)


def slowly(scorer: Scorer, seconds: float = 0.02) -> list[Request]:
    """Let this process take its time, so that the helper has a part; what is read here is in the list."""
    read, here = scorer.reader.read, list[Request]()

    def slow(request: Request) -> Any:
        here.append(request)
        time.sleep(seconds)
        return read(request)

    scorer.reader.read = slow  # type: ignore[method-assign]
    return here


def test_two_processes_say_what_one_says_to_the_bit(pair: tuple[Model, Helpers]) -> None:
    model, helpers = pair
    questions = random_questions(1, count=30)
    blanks = [Blank(question.context, items=[str(i)], gold=7) for i, question in enumerate(questions)]
    prompts = [question.context for question in questions]

    def everything(scorer: Scorer) -> Any:
        watching = scorer.watcher = Watching()
        scored = scorer.log_likelihoods(questions)
        scorer.watcher = None
        rows = [
            (i, row.tolist())
            for part, log_probs in scorer.distributions(blanks)
            for i, row in zip(part, log_probs, strict=True)
        ]
        deep = [(part, states.tolist()) for part, states in scorer.distributions_by_depth(blanks)]
        said = scorer.generate(prompts, 5, LongEnough(4))
        return scored, rows, deep, said, watching.told, scorer.tokens_read, scorer.tokens_padded, scorer.passes

    alone = Scorer(model, SMALL)
    shared = Scorer(model, SMALL, helpers=helpers)
    here = slowly(shared)
    assert everything(shared) == everything(alone)
    assert 0 < len(here) < shared.passes
    assert not shared.fallbacks


def test_an_error_of_another_process_is_raised_here(pair: tuple[Model, Helpers]) -> None:
    model, helpers = pair
    outside = [Question([10**6, 5], [[6]]), Question([10**6, 7], [[6]])]
    with pytest.raises(IndexError) as alone:
        Scorer(model, 1).log_likelihoods(outside)
    shared = Scorer(model, 1, helpers=helpers)
    shared.reader.read = lambda request: time.sleep(0.3) or iter(())  # type: ignore[method-assign]
    with pytest.raises(IndexError) as found:
        shared.log_likelihoods(outside)
    assert str(found.value) == str(alone.value)
    assert len(helpers.pids) == 1  # and it reads on
    questions = random_questions(2)
    assert Scorer(model, SMALL, helpers=helpers).log_likelihoods(questions) == Scorer(model, SMALL).log_likelihoods(
        questions
    )


def test_another_model_is_read_by_one_process(pair: tuple[Model, Helpers]) -> None:
    model, helpers = pair
    other = replace(model)
    other.network = type(model.network)(model.network.config).eval()
    questions = random_questions(5)
    assert Scorer(other, helpers=helpers).log_likelihoods(questions) == Scorer(other).log_likelihoods(questions)


def test_the_questions_of_a_killed_process_are_asked_again(
    pair: tuple[Model, Helpers], caplog: pytest.LogCaptureFixture
) -> None:
    model, helpers = pair
    questions = random_questions(4, count=20)
    (pid,) = helpers.pids
    os.kill(pid, signal.SIGSTOP)  # it takes a batch and does not answer
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    shared = Scorer(model, SMALL, helpers=helpers)
    assert shared.log_likelihoods(questions) == Scorer(model, SMALL).log_likelihoods(questions)
    told = "a process that asks was killed by signal 9 (SIGKILL); 1 go on, and ask its questions again"
    assert shared.fallbacks == [told]
    assert [record.getMessage() for record in caplog.records] == [told]
    assert helpers.pids == []
    assert Scorer(model, SMALL, helpers=helpers).log_likelihoods(questions) == shared.log_likelihoods(questions)


def test_a_model_that_cannot_be_handed_over_is_read_by_one_process(
    tiny_model: Callable[[str], Model], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    model.network.register_forward_hook(lambda *_: None)
    with Helpers(2) as helpers:
        scorer = Scorer(model, helpers=helpers)
        assert scorer.log_likelihoods(random_questions(6)) == Scorer(model).log_likelihoods(random_questions(6))
    assert len(scorer.fallbacks) == 1 and scorer.fallbacks[0].endswith(": one process asks")
    assert "cannot be handed to other processes" in caplog.text


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "null"])
def test_numbers_of_processes_that_are_none(value: str) -> None:
    with pytest.raises(BadInput, match=r"run\.processes"):
        build("run", {"processes": yaml.safe_load(value)}, Doing)


def test_every_process_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "resolve_device", lambda choice: torch.device(choice))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for count, place in [(1, "cuda:1"), (1, "mps"), (2, "cuda"), (64, "cpu")]:
        check_processes(count, place)
    with pytest.raises(BadInput, match=r"run.processes=3 .* this machine has 2; give run.processes=2 or fewer"):
        check_processes(3, "cuda")
    for place in ("cuda:1", "mps"):
        with pytest.raises(BadInput, match=f"run.processes=2 needs as many GPUs, and device={place} is one"):
            check_processes(2, place)
    monkeypatch.undo()
    with pytest.raises(BadInput, match="device_map=auto divides"):
        check_processes(2, Spread("cpu"))


def test_how_many_ask_decides_nothing(tiny_folder: Path) -> None:
    one = made(tiny_folder, {"a": SUITE})
    four = replace(one, processes=4)
    assert (four.id, four.settings, four.dense().processes) == (one.id, one.settings, 4)
    stock = Harness(["boolq"], scoring="stock")
    with pytest.raises(BadInput, match=r"run.processes=2 works only with our scoring core; choose scoring=fast"):
        replace(one, suites={"h": stock}, processes=2)
