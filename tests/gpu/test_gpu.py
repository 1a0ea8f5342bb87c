"""All that is shipped, run on a GPU as users run it, and held against the same on the processor: ``make test-gpu``.

It needs nothing but this repository, its pinned packages and its embedded models. ``KC_TEST_DEVICE=cpu`` puts the
processor in the GPU's place, and ``KC_TEST_GPUS=1`` a stand-in for a GPU; docs/gpu.md says what was run where.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.commands import GPUS
from helpers.matrix import (
    CALIBRATED,
    COMPRESSIONS,
    WIDE,
    check,
    elsewhere,
    runs_in,
    sweep,
    write_model,
    write_text,
)
from knowledge_compression.results.store import Run

DEVICE = os.environ.get("KC_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        DEVICE.startswith("cuda") and not torch.cuda.is_available() and GPUS not in os.environ,
        reason=f"no CUDA device here; {GPUS}=1 tries stand-ins, KC_TEST_DEVICE=cpu the processor",
    ),
]

DTYPES = ["float32", "float16", "bfloat16"]
RECOVERIES = {"bert": "lora,prompt", "t5": "lora,prompt", "llama": "lora,prompt,prefix,idp,concat"}
TRAINING = ["recovery.training.tokens=2304", "recovery.training.checkpoint_every=10", "recovery.training.batch_size=4"]

# How far the GPU's results may lie from the processor's, as shares. In float32 both sum the same products in other
# orders; what is then rounded to a grid, or ranked, may fall to the other side for a few weights.
DENSE = 1e-4  # perplexity of the model as it was loaded; of compressed ones see helpers/matrix.py
ERRORS = 1e-1  # error of a layer that a calibrated method reports
LOG_PROBS = 1e-3  # of an answer, absolute
SAME_ANSWERS = 0.99  # share of the questions that get the same answer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=sorted(WIDE))
def folder(request: pytest.FixtureRequest, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of each family."""
    return write_model(tmp_path_factory.mktemp(request.param), request.param, tiny_tokenizer)


def on(device: str, outputs: Path, data: Path, *choices: str) -> dict[str, Run]:
    """The runs of a sweep on a device, by compression, or by recovery where they have one."""
    sweep(outputs, data, f"device={device}", *choices)
    found: dict[str, Run] = {}
    for compression, run in runs_in(outputs):
        assert run.environment["device"].startswith(device.partition(":")[0])
        recovery = run.config["choices"]["recovery"]
        name = compression if recovery == "none" else recovery
        assert name not in found
        found[name] = run
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_compression(folder: Path, data: Path, tmp_path: Path, dtype: str) -> None:
    chosen = ["model=local", f"model.path={folder}", f"compression={','.join(COMPRESSIONS)}", f"dtype={dtype}"]
    runs = on(DEVICE, tmp_path / "outputs", data, *chosen)
    assert sorted(runs) == sorted(COMPRESSIONS)
    for name, run in runs.items():
        assert run.environment["dtype"] == f"torch.{dtype}"
        if name != "none":
            check(name, run, folder.name, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_recovery(folder: Path, data: Path, tmp_path: Path, dtype: str) -> None:
    recoveries = RECOVERIES[folder.name]
    chosen = ["model=local", f"model.path={folder}", "compression=magnitude", f"recovery={recoveries}", *TRAINING]
    runs = on(DEVICE, tmp_path / "outputs", data, f"dtype={dtype}", *chosen)
    assert set(runs) == {"none", *recoveries.split(",")}
    for name, run in runs.items():
        assert all(math.isfinite(value) for value in run.metrics.values()), name
        if name != "none":
            report = run.report["recovery"]
            assert report["trainable_parameters"] > 0 and report["seconds"] > 0, name
            assert math.isfinite(report["loss_before"]) and math.isfinite(report["loss_after"]), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_in_each_precision(folder: Path, data: Path, tmp_path: Path, precision: str) -> None:
    chosen = ["model=local", f"model.path={folder}", "compression=magnitude", "recovery=lora", "dtype=float32"]
    runs = on(DEVICE, tmp_path / "outputs", data, *chosen, *TRAINING, f"recovery.training.precision={precision}")
    assert math.isfinite(runs["lora"].report["recovery"]["loss_after"])


def test_passes_in_bfloat16(folder: Path, data: Path, tmp_path: Path) -> None:
    """What ``auto`` is on most GPUs; the solver stays in float32."""
    chosen = ["model=local", f"model.path={folder}", f"compression={','.join(CALIBRATED)}", "dtype=float32"]
    runs = on(DEVICE, tmp_path / "outputs", data, *chosen, "compression.forward_dtype=bfloat16")
    for name in CALIBRATED:
        check(name, runs[name], folder.name, "float32")


def test_compressions_are_those_of_the_processor(folder: Path, data: Path, tmp_path: Path) -> None:
    chosen = ["model=local", f"model.path={folder}", "dtype=float32"]
    free = [name for name in COMPRESSIONS if name not in CALIBRATED]
    here, there = (
        on(device, tmp_path / where, data, *chosen, f"compression={','.join(free)}")
        | on(
            device, tmp_path / f"{where}-calibrated", data, *chosen,
            f"compression={','.join(CALIBRATED)}", "compression.forward_dtype=float32",
        )
        for device, where in ((DEVICE, "here"), ("cpu", "there"))
    )  # fmt: skip
    for name in COMPRESSIONS:
        bound = DENSE if name == "none" else elsewhere(name)
        of_both = [one[name].metrics["perplexity.perplexity"] for one in (here, there)]
        assert of_both[0] == pytest.approx(of_both[1], rel=bound), name
        if name == "none":
            continue
        assert here[name].report["compression"]["sparsity"] == there[name].report["compression"]["sparsity"], name
        for ours, theirs in zip(here[name].layers, there[name].layers, strict=True):
            assert [ours[key] for key in ("path", "bits", "parameters")] == [
                theirs[key] for key in ("path", "bits", "parameters")
            ]
            if theirs.get("error_after"):
                assert ours["error_after"] == pytest.approx(theirs["error_after"], rel=ERRORS), (name, ours["path"])


@pytest.mark.parametrize("model", ["bert_tiny", "smollm2"])
def test_answers_are_those_of_the_processor(model: str, data: Path, tmp_path: Path) -> None:
    """The embedded models, dense and pruned, question by question."""
    chosen = [f"model={model}", "compression=magnitude", "dtype=float32", "eval=[atlas]", "limit=200"]
    here, there = (
        on(device, tmp_path / where, data, *chosen) for device, where in ((DEVICE, "here"), ("cpu", "there"))
    )
    for name, run in here.items():
        ours, theirs = (one.items.sort("id") for one in (run, there[name]))
        assert ours["id"].equals(theirs["id"])
        moved = np.abs(ours["log_prob"].to_numpy() - theirs["log_prob"].to_numpy())
        assert moved.max() <= LOG_PROBS, (name, moved.max())
        assert (ours["prediction"] == theirs["prediction"]).mean() >= SAME_ANSWERS, name
