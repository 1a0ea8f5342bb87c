"""Latency: what is measured, in which unit, on which family."""

from __future__ import annotations

import time

import pytest

from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.latency import Latency

SMALL = Latency(batch=2, length=12, decode_tokens=3, repeats=4, warmup=1)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "t5", "bart", "bert"])
def test_every_family_is_measured(tiny_model, architecture):
    found = SMALL.evaluate(tiny_model(architecture))
    kinds = {"prefill"} if architecture == "bert" else {"prefill", "decode"}
    assert set(found.items["task"]) == kinds
    assert found.items.height == 4 * len(kinds)
    for kind in kinds:
        seconds = found.items.filter(task=kind)["seconds"]
        assert found.metrics[f"{kind}_seconds"] == pytest.approx(seconds.median())
        assert seconds.min() == found.metrics[f"{kind}_seconds_min"] > 0
        assert seconds.max() == found.metrics[f"{kind}_seconds_max"]


def test_decode_is_the_time_of_one_token_through_the_cache(tiny_model):
    model = tiny_model("llama")
    calls = []

    def slow(_, args, kwargs):
        calls.append(kwargs["input_ids"].shape[1])
        time.sleep(0.02)

    model.network.register_forward_pre_hook(slow, with_kwargs=True)
    found = SMALL.evaluate(model)
    assert calls == [12, 1, 1, 1] * 5  # a warm-up and four repeats
    assert 0.02 <= found.metrics["decode_seconds"] < 0.04


def test_memory_is_that_of_the_worst_moment(tiny_model):
    model = tiny_model("bert")

    def hungry(*_):
        import torch

        torch.ones(20_000_000).sum()

    model.network.register_forward_hook(hungry)
    # The kernel may take idle pages away while we look, so that one look in a few may miss what came on top.
    looks = [SMALL.evaluate(model) for _ in range(3)]
    if "peak_memory" in looks[0].metrics:
        assert 80e6 * 0.9 < max(look.metrics["peak_memory"] for look in looks) < 200e6
    else:
        assert looks[0].description["memory"] == "not told by this system"


def test_what_cannot_be_measured_says_so(tiny_model):
    with pytest.raises(BadInput, match=r"eval\.latency\.repeats=0 must be at least 1"):
        Latency(repeats=0)
    with pytest.raises(BadInput, match=r"do not fit the 128 positions of tiny-opt; choose a length of 112 or less"):
        Latency().evaluate(tiny_model("opt"))
