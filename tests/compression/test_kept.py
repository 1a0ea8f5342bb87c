"""A compressed model that is found again is the one that compressing anew would give, bit for bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.networks import VOCABULARY, logits_of
from knowledge_compression.compression.kept import KeptModels, code_of
from knowledge_compression.compression.methods.awq import Awq
from knowledge_compression.compression.methods.gptq import Gptq
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.int8_static import Int8Static
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.nf4 import Nf4
from knowledge_compression.compression.methods.pipeline import Pipeline
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.smoothquant import SmoothQuant
from knowledge_compression.compression.methods.sparsegpt import SparseGpt
from knowledge_compression.compression.solve.grid import quantized_weight
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model, Target
from knowledge_compression.models.targets import linear_layers

ALL = Target("all", ["encoder_att", "decoder_self_att", "cross_att", "ff", "final"])
METHODS: dict[str, Any] = {
    "magnitude": Magnitude(sparsity=0.5),
    "rtn": Rtn(bits=4),
    "gptq": Gptq(bits=3, group_size=8),
    "awq": Awq(bits=4, group_size=8),
    "awq_folded": Awq(bits=4, group_size=8, fold=True),
    "nf4": Nf4(),
    "sparsegpt": SparseGpt(sparsity=0.5),
    "int8_dynamic": Int8Dynamic("per_channel"),
    "int8_static": Int8Static(),
    "smoothquant": SmoothQuant(),
    "smoothquant_folded": SmoothQuant(fold=True),
    "prune_int8": Pipeline([Magnitude(sparsity=0.5), Int8Dynamic("per_tensor")]),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compressions"


class Once:
    """A compression that counts how often it is asked."""

    def __init__(self, method: Any, target: Target = ALL) -> None:
        self.method, self.target, self.count = method, target, 0

    def on(self, model: Model, kept: KeptModels, key: str = "a", **how: Any) -> Any:
        targets = self.target.select(model)
        text = torch.randint(7, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))

        def compress() -> Any:
            self.count += 1
            return self.method.compress(model, targets, text if self.method.calibrated else None)

        return kept.compress(key, model, targets, self.method, compress, **({"afresh": False} | how))


def everything(model: Model) -> dict[str, torch.Tensor]:
    return dict(chain(model.network.named_parameters(), model.network.named_buffers()))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("name", METHODS)
def test_what_is_found_is_what_was_made(name: str, architecture: str, tiny_model: Callable[[str], Model]) -> None:
    first, second = tiny_model(architecture), tiny_model(architecture)
    dense = logits_of(first)
    once, kept = Once(METHODS[name]), KeptModels(1.0)
    report, found = once.on(first, kept)
    assert not found
    again, found = once.on(second, kept)
    assert found and once.count == 1 and again == report
    here, there = everything(first), everything(second)
    assert here.keys() == there.keys() and all(torch.equal(here[n], there[n]) for n in here)
    assert [(p, type(m)) for p, m in first.network.named_modules()] == [
        (p, type(m)) for p, m in second.network.named_modules()
    ]
    assert torch.equal(logits_of(first), logits_of(second)) and not torch.equal(logits_of(first), dense)
    second.network.tie_weights()  # lm-eval does
    assert torch.equal(logits_of(first), logits_of(second))
    integers = [[quantized_weight(layer) for layer in linear_layers(model)] for model in (first, second)]
    coded = ("rtn", "gptq", "awq_folded", "nf4", "int8_dynamic", "int8_static", "smoothquant_folded")
    assert any(integers[0]) == (name in coded)
    for one, other in zip(*integers, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            (here, said), (there, said_there) = one.taken_apart(), other.taken_apart()
            assert said == said_there and here.keys() == there.keys()
            assert all(torch.equal(here[part], there[part]) for part in here)


def test_only_what_changed_is_kept(tiny_model: Callable[[str], Model], cache: Path) -> None:
    for key, target in (("all", ALL), ("final", Target("final", ["final"]))):
        Once(Magnitude(sparsity=0.5), target).on(tiny_model("llama"), KeptModels(1.0), key)
    sizes = {folder.name: sum(f.stat().st_size for f in folder.iterdir()) for folder in cache.glob("[!.]*")}
    head = tiny_model("llama").network.lm_head.weight.nbytes
    assert head < sizes["final"] < head + 4000 < sizes["all"]


def test_no_more_is_kept_than_there_is_room_for(tiny_model: Callable[[str], Model], cache: Path) -> None:
    once = Once(Magnitude(sparsity=0.5))
    once.on(tiny_model("llama"), KeptModels(1.0), "a")
    size = sum(f.stat().st_size for f in (cache / "a").iterdir())
    room = KeptModels(2.5 * size / 1e9)
    once.on(tiny_model("llama"), room, "b")
    for place, time in (("a", 1000), ("b", 2000)):
        os.utime(cache / place, (time, time))
    once.on(tiny_model("llama"), room, "a")  # used just now
    once.on(tiny_model("llama"), room, "c")
    assert sorted(path.name for path in cache.glob("[!.]*")) == ["a", "c"]
    once.on(tiny_model("llama"), KeptModels(0.0), "d")
    assert not (cache / "d").exists() and once.count == 4


def test_a_full_disk_is_left_room(
    tiny_model: Callable[[str], Model], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, kept = Once(Magnitude(sparsity=0.5)), KeptModels(1.0)
    for place in ("a", "b"):
        once.on(tiny_model("llama"), kept, place)
    size = sum(f.stat().st_size for f in (cache / "a").iterdir())
    for place, time in (("a", 2000), ("b", 1000)):
        os.utime(cache / place, (time, time))
    total = 1000 * size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(total, 0, 99.5 * size))  # type: ignore[attr-defined]
    once.on(tiny_model("llama"), kept, "c")
    assert sorted(path.name for path in cache.glob("[!.]*")) == ["a", "c"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(total, 0, 0))  # type: ignore[attr-defined]
    once.on(tiny_model("llama"), kept, "d")
    assert sorted(path.name for path in cache.glob("[!.]*")) == ["d"]


def test_a_broken_file_and_a_forced_run_compress_again(tiny_model: Callable[[str], Model], cache: Path) -> None:
    once, kept = Once(Int8Dynamic("per_channel")), KeptModels(1.0)
    once.on(tiny_model("bert"), kept)
    file = cache / "a" / "changes.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    model = tiny_model("bert")
    assert once.on(model, kept)[1] is False and once.count == 2
    assert once.on(tiny_model("bert"), kept)[1] is True
    assert once.on(tiny_model("bert"), kept, afresh=True)[1] is False and once.count == 3
    assert once.on(tiny_model("bert"), kept)[1] is True


def test_a_compression_that_fails_leaves_nothing(tiny_model: Callable[[str], Model], cache: Path) -> None:
    with pytest.raises(BadInput, match="group_size"):
        Once(Rtn(bits=4, group_size=700)).on(tiny_model("llama"), KeptModels(1.0))
    assert not list(cache.glob("[!.]*"))


SOURCE = """
from knowledge_compression.compression.methods.magnitude import Magnitude

class Mine(Magnitude):
    share = {}
"""


def test_a_method_that_was_edited_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "method_of_mine.py"
    file.write_text(SOURCE.format(0.1))
    monkeypatch.syspath_prepend(tmp_path)
    import method_of_mine  # type: ignore[import-not-found]

    mine = method_of_mine.Mine(sparsity=0.5)
    before = code_of(mine), code_of(Pipeline([Magnitude(sparsity=0.5), mine])), code_of(Magnitude(sparsity=0.5))
    assert len(set(before)) == 3 and code_of(Magnitude(sparsity=0.2)) == before[2]
    file.write_text(SOURCE.format(0.2))
    assert code_of(mine) != before[0] and code_of(Pipeline([Magnitude(sparsity=0.5), mine])) != before[1]
    assert code_of(Magnitude(sparsity=0.5)) == before[2]


class Listening(Magnitude):
    """Hangs a hook on a layer, which no file can hold."""

    def compress(self, model: Model, targets: Any, calibration: Any = None) -> Any:
        report = super().compress(model, targets, calibration)
        targets[0].module.register_forward_hook(lambda *_: None)
        return report


class Undeclared(Int8Dynamic):
    """Does not declare that it replaces linear layers by modules."""

    modules = ()


@pytest.mark.parametrize("method", [Listening(sparsity=0.5), Undeclared()])
def test_what_cannot_be_kept_is_done_each_time(
    method: Any, tiny_model: Callable[[str], Model], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = Target("att", ["decoder_self_att"])
    once, kept = Once(method, target), KeptModels(1.0)
    for _ in range(2):
        assert once.on(tiny_model("llama"), kept)[1] is False
    assert once.count == 2 and "cannot be cached" in caplog.text and not list(cache.glob("[!.]*"))
