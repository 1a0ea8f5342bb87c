"""Latency: what is measured, in which unit, on which family."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from helpers.places import ROOT
from knowledge_compression.errors import BadInput
from knowledge_compression.evaluation.latency import Latency
from knowledge_compression.evaluation.scoring import Scorer

SMALL = Latency(batch=2, length=12, decode_tokens=3, repeats=4, warmup=1)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "t5", "bart", "bert"])
def test_every_family_is_measured(tiny_model, architecture):
    found = SMALL.evaluate(Scorer(tiny_model(architecture)))
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
    found = SMALL.evaluate(Scorer(model))
    assert calls == [12, 1, 1, 1] * 5  # a warm-up and four repeats
    assert 0.02 <= found.metrics["decode_seconds"] < 0.04


# In a process of its own: one that did much before has freed memory at hand, and its high-water mark does not rise.
HUNGRY = """
import torch
from knowledge_compression.memory import peak_memory

with peak_memory(torch.device("cpu")) as memory:
    torch.ones(20_000_000).sum()
print(memory.bytes)
"""


@pytest.mark.slow
def test_memory_is_that_of_the_worst_moment():
    done = subprocess.run([sys.executable, "-c", HUNGRY], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if sys.platform == "linux":
        assert 80e6 * 0.9 < int(done.stdout) < 200e6
    else:
        assert done.stdout.strip() == "None"


def test_what_cannot_be_measured_says_so(tiny_model):
    with pytest.raises(BadInput, match=r"eval\.latency\.repeats=0 must be at least 1"):
        Latency(repeats=0)
    with pytest.raises(BadInput, match=r"do not fit the 128 positions of tiny-opt; choose a length of 112 or less"):
        Latency().evaluate(Scorer(tiny_model("opt")))
