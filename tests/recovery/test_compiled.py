"""Trainings whose blocks are compiled give what plain ones give, and go on without where compiling fails."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from helpers.layers import windows
from helpers.places import EXHAUSTIVE
from knowledge_compression.cache import cache_folder
from knowledge_compression.models import Model, compiled
from knowledge_compression.objectives import objective_for
from knowledge_compression.recovery.lora import Lora
from knowledge_compression.training import TrainingReport, TrainingSettings, train

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler"
)
TRAINING: dict[str, Any] = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "schedule": "constant"}


def trained(model: Model, **settings: Any) -> tuple[TrainingReport, list[torch.Tensor]]:
    """LoRA with dropout: the report, and the trained parameters."""
    training = TrainingSettings(**TRAINING, **settings)
    torch.manual_seed(0)
    network = Lora(training, rank=2, dropout=0.2).trainable(model)
    report = train(network, windows(), objective_for(model), training)
    return report, [p.detach().clone() for p in network.parameters() if p.requires_grad]


def why_plain(tiny_model: Callable[[str], Model]) -> str:
    """Why blocks that should be compiled ran as they are, which must leave no other trace."""
    plain, expected = trained(tiny_model("llama"))
    report, found = trained(tiny_model("llama"), torch_compile=True)
    assert report.not_compiled is not None
    assert report.loss_after == plain.loss_after
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return report.not_compiled


@needs_compiler
@pytest.mark.parametrize("architecture", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_compiled_blocks_train_as_plain_ones(
    tiny_model: Callable[[str], Model], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if architecture == "t5" and not EXHAUSTIVE:  # its loops take a compiler three minutes, its graphs seconds
        monkeypatch.setattr(compiled, "_BACKEND", "aot_eager")
    plain, expected = trained(tiny_model(architecture))
    model = tiny_model(architecture)
    report, found = trained(model, torch_compile=True)
    assert report.not_compiled is None
    assert report.loss_after == pytest.approx(plain.loss_after, rel=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.network.modules())


@pytest.mark.parametrize("chosen", [None, "torch's own", "elsewhere"])
def test_generated_code_is_kept_where_the_user_chooses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, chosen: str | None
) -> None:
    """Importing parts of torch writes torch's own choice into the variable, which is no choice of the user's."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    if chosen is not None:
        folder = default_cache_dir() if chosen == "torch's own" else str(tmp_path)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
    with compiled._settings():
        assert cache_dir() == str(tmp_path if chosen == "elsewhere" else cache_folder() / "compiled")


def test_digests_from_before_the_setting_stay() -> None:
    """Adapters, checkpoints and trained worlds are found by the settings of their training."""
    plain = TrainingSettings(steps=1)
    assert "torch_compile" not in plain.to_json()
    assert replace(plain, torch_compile=True).to_json() == plain.to_json() | {"torch_compile": True}


def test_without_a_compiler_the_blocks_run_as_they_are(
    tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # where nothing has been compiled yet
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()  # nor in this process
    assert "no-such-compiler" in why_plain(tiny_model)


def test_a_failure_leaves_the_blocks_as_they_are(
    tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("no compiler here\nand more lines")

    monkeypatch.setattr(compiled, "_BACKEND", failing)
    with caplog.at_level(logging.WARNING):
        why = why_plain(tiny_model)
    assert "no compiler here" in why
    said = [record.message for record in caplog.records]
    assert said.count(f"blocks are not compiled from here on: {why}") == 1


def test_a_failure_of_the_backward_pass_leaves_the_blocks_as_they_are(
    tiny_model: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("no way back")

    backend = aot_autograd(fw_compiler=lambda graph, _inputs: make_boxed_func(graph), bw_compiler=failing)
    monkeypatch.setattr(compiled, "_BACKEND", backend)
    assert "no way back" in why_plain(tiny_model)
