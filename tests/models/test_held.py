"""A model that is loaded once is given to every run as it was loaded."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch

from helpers.networks import logits_of
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.models import Model, Target, held
from knowledge_compression.models.held import HeldSource


@dataclass
class Counted:
    make: Callable[[], Model]
    name: str = "tiny"
    loads: list[str] = field(default_factory=list)

    def load(self, device: str = "auto", dtype: str = "auto") -> Model:
        self.loads.append(self.name)
        return self.make()

    def skeleton(self) -> Model:
        self.loads.append("skeleton")
        return self.make()

    def fingerprint(self) -> str:
        return self.name


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "_loaded", {})
    monkeypatch.setattr(held, "_skeletons", {})


def test_what_one_run_does_no_other_sees(any_tiny_model: Model, tiny_model: Callable[[str], Model]) -> None:
    architecture = any_tiny_model.network.config.model_type
    source = Counted(lambda: tiny_model(architecture))
    wanted = logits_of(tiny_model(architecture))
    first = HeldSource(source).load()
    first.untie_head()
    Magnitude(sparsity=0.9).compress(first, Target("final", ["final"]).select(first), None)
    with torch.no_grad():
        for parameter in first.network.parameters():
            parameter.zero_()
    first.tokenizer.pad_token = "the"
    second = HeldSource(source).load()
    assert torch.equal(logits_of(second), wanted)
    assert second.head_is_tied == tiny_model(architecture).head_is_tied and second.tokenizer.pad_token == "[PAD]"
    assert source.loads == ["tiny"]


def test_only_the_last_model_is_held(tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [Counted(lambda: tiny_model("llama"), name) for name in ("one", "two")]
    for source in (sources[0], sources[0], sources[1], sources[0]):
        HeldSource(source).load()
        HeldSource(source).skeleton()
    assert sources[0].loads == ["one", "skeleton", "one"] and sources[1].loads == ["two", "skeleton"]
    assert deepcopy(HeldSource(sources[0])).name == "one"
    assert len(held._loaded) == 1 and HeldSource(sources[0]).name == "one"
    monkeypatch.setattr(held, "_fits_again", lambda model: False)
    for _ in range(2):
        HeldSource(sources[1]).load()
    assert sources[1].loads.count("two") == 3 and not held._loaded
