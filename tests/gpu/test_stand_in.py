"""What is shipped, run with ``device=cuda`` and over several GPUs on stand-ins for them, without a GPU.

They are memory of the processor that says it is a GPU's (helpers/stand_in_gpu.py), so the answers must be the
processor's. They need a build of torch that has no CUDA of its own. A real GPU is tested by test_gpu.py.
"""

from __future__ import annotations

import math
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import matrix, stand_in_gpu
from helpers.commands import GPUS
from helpers.places import TESTS
from helpers.questions import random_questions
from knowledge_compression.evaluation.scoring import Scorer
from knowledge_compression.evaluation.scoring.helpers import Helpers
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.spread import Spread, bytes_by_place
from knowledge_compression.objectives import objective_for
from knowledge_compression.recovery.lora import Lora
from knowledge_compression.results.store import Run
from knowledge_compression.training import TrainingSettings, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is not None, reason="stand-ins take the place of CUDA in torch's CPU build"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="stand-ins for GPUs are compiled by g++"),
]

TEXT = ["eval.perplexity.window=24", "eval.perplexity.masked_per_window=4", "limit=4"]
TWO = "max_memory={0: 1000KB, 1: 4000KB}"  # of a model of 0.9 to 1.4 MB, both of which are used
RECOVERIES = {"bert": "prompt", "t5": "lora", "llama": "lora,prompt,prefix,idp,concat"}
TRAINING = ["recovery.training.tokens=768", "recovery.training.checkpoint_every=10", "recovery.training.batch_size=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matrix.write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=sorted(matrix.WIDE))
def folder(request: pytest.FixtureRequest, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of each family."""
    return matrix.write_model(tmp_path_factory.mktemp(request.param), request.param, tiny_tokenizer)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The programs that a test starts have two, and find nothing that others computed."""
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(GPUS, "2")


def perplexity(run: Run) -> float:
    return float(run.metrics["perplexity.perplexity"])


def runs(outputs: Path, folder: Path, data: Path, *choices: str) -> list[Run]:
    """The runs of a sweep, without the dense one."""
    matrix.sweep(outputs, data, "model=local", f"model.path={folder}", "dtype=float32", *choices)
    found = [run for name, run in matrix.runs_in(outputs) if name != "none"]
    assert found
    for run in found:
        assert run.environment["device"].startswith("cuda:") and run.environment["gpu"] == stand_in_gpu.NAME
    return found


@pytest.mark.parametrize("calibrated", [False, True])
def test_every_compression(folder: Path, data: Path, tmp_path: Path, gpus: None, calibrated: bool) -> None:
    names = [name for name in matrix.COMPRESSIONS if (name in matrix.CALIBRATED) == calibrated and name != "none"]
    chosen = matrix.in_turn(names, folder.name)
    exact = ["compression.forward_dtype=float32"] if calibrated else []
    found = runs(tmp_path / "there", folder, data, "device=cuda", f"compression={','.join(chosen)}", *exact)
    assert sorted(run.config["choices"]["compression"] for run in found) == sorted(chosen)
    for run in found:
        name = run.config["choices"]["compression"]
        matrix.check(name, run, folder.name, "float32")
        here = matrix.done(tmp_path / "here", folder, data, matrix.shipped_compression(name), "float32")
        if name not in matrix.QUICK:  # which takes fewer steps there
            assert perplexity(run) == pytest.approx(perplexity(here), rel=matrix.elsewhere(name)), name


def test_every_recovery(folder: Path, data: Path, tmp_path: Path, gpus: None) -> None:
    recoveries = RECOVERIES[folder.name].split(",")
    found = runs(
        tmp_path / "outputs", folder, data, "device=cuda:1", f"recovery={','.join(recoveries)}", *TRAINING
    )  # not the first, which what forgets to say where would use
    assert sorted(run.config["choices"]["recovery"] for run in found) == sorted(recoveries)
    for run in found:
        report = run.report["recovery"]
        assert report["trainable_parameters"] > 0 and math.isfinite(report["loss_before"] + report["loss_after"])
        assert math.isfinite(perplexity(run))


def test_divided_over_two(folder: Path, data: Path, tmp_path: Path, gpus: None) -> None:
    """Compressed, recovered and asked in every way."""
    asked = ["eval=[perplexity,similarity,latency]", *TEXT, "distance=true"]
    asked += ["eval.latency.length=32", "eval.similarity.windows=2", "eval.similarity.length=32"]
    chosen = ["compression=rtn", f"recovery={'prompt' if folder.name == 'llama' else 'none'}", *asked]
    chosen += TRAINING if folder.name == "llama" else []
    (divided,) = runs(tmp_path / "divided", folder, data, "device=cuda", "device_map=auto", TWO, *chosen)
    (whole,) = runs(tmp_path / "whole", folder, data, "device=cuda", "model.stream=true", *chosen)
    assert set(divided.report["spread"]) == {"cuda:0", "cuda:1"}
    assert divided.id == whole.id
    for name, value in whole.metrics.items():
        if not name.startswith("latency"):
            assert divided.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_samples_of_the_model_itself(folder: Path, data: Path, tmp_path: Path, gpus: None) -> None:
    """Drawn there, by the GPU's own random numbers."""
    if folder.name == "bert":
        pytest.skip("an encoder writes no text")
    (run,) = runs(tmp_path / "outputs", folder, data, "device=cuda", "corpus=self", "compression=gptq")
    assert math.isfinite(perplexity(run)) and run.report["compression"]["calibration"]


# What follows runs in processes of their own, because one that has stand-ins keeps them.


def on_gpus(work: Callable[..., None], *arguments: Any, count: int = 2, memory: int = 2 << 30) -> None:
    """Do work in another process with so many stand-ins of so many bytes."""
    process = multiprocessing.get_context("spawn").Process(target=_begun, args=(count, memory, work, *arguments))
    process.start()
    process.join()
    assert process.exitcode == 0


def _begun(count: int, memory: int, work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    stand_in_gpu.begin(count, memory)
    work(*arguments)


def _refusals() -> None:
    first, second = torch.ones(3, 4, device="cuda"), torch.ones(3, 4, device="cuda:1")
    for other in (torch.ones(3, 4), second, torch.ones(1)):
        with pytest.raises(RuntimeError, match="at least two devices"):
            first + other
    assert (first + torch.tensor(1.0)).device == first[torch.tensor([0])].device == first.device
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        first.numpy()
    with pytest.raises(RuntimeError, match="greater than 16"):
        torch._int_mm(*torch.ones(2, 8, 8, dtype=torch.int8, device="cuda"))
    with pytest.raises(RuntimeError, match="not implemented for 'Int'"):
        first.int() @ first.int().T
    with pytest.raises(NotImplementedError):
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*torch.ones(3, 1, 1, 2, 4, device="cuda"))
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    torch.manual_seed(0)
    here = torch.rand(3)
    torch.manual_seed(0)
    there, after = torch.rand(3, device="cuda"), torch.rand(3)
    assert there.device == first.device and torch.equal(here, after)  # their random numbers are apart
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3, device="cuda"), there)
    before = torch.cuda.memory_allocated("cuda:1")
    kept = second * 2
    assert torch.cuda.memory_allocated("cuda:1") == before + kept.nbytes
    weights = torch.nn.Linear(4, 2).to("cuda:1")
    weights(second).sum().backward()
    assert weights.weight.grad is not None and weights.weight.grad.device == second.device
    view = second[1:].view(-1)
    view += 1
    assert second.sum().item() == 12 + 8


def test_a_stand_in_refuses_what_a_gpu_refuses() -> None:
    on_gpus(_refusals)


def _halved(folder: Path) -> None:
    model, there = (LocalModel("local", str(folder)).load(place) for place in ("cpu", "cuda"))
    scorer = Scorer(there, 1 << 16)
    questions = random_questions(0, count=400)
    taken = torch.empty(torch.cuda.mem_get_info()[0] - (4 << 20), dtype=torch.uint8, device="cuda")
    found = [one.log_prob for said in scorer.log_likelihoods(questions) for one in said]
    assert len(taken) and any("out of memory" in told for told in scorer.fallbacks)
    expected = [one.log_prob for said in Scorer(model).log_likelihoods(questions) for one in said]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_pass_that_finds_no_memory_is_halved(tmp_path: Path, tiny_tokenizer: Any) -> None:
    on_gpus(_halved, matrix.write_model(tmp_path, "llama", tiny_tokenizer), count=1, memory=64 << 20)


def _shared(folder: Path) -> None:
    sys.path.insert(0, str(TESTS / "helpers" / "gpus"))  # which the second process begins with
    model = LocalModel("local", str(folder)).load("cuda")
    questions = random_questions(0, count=60)
    alone = Scorer(model, 64).log_likelihoods(questions)
    with Helpers(2) as helpers:
        scorer = Scorer(model, 64, helpers=helpers)
        helpers.start(scorer.reader)
        assert len(helpers.pids) == 1
        assert scorer.log_likelihoods(questions) == alone
        assert not scorer.fallbacks


def test_two_processes_on_a_gpu_each(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GPUS, "2")  # of the second process, which the first starts
    on_gpus(_shared, matrix.write_model(tmp_path, "llama", tiny_tokenizer))


class _Interrupted(Exception):
    """As if the job were stopped."""


def _resumed(folder: Path) -> None:
    windows = torch.randint(5, 90, (8, 16), generator=torch.Generator().manual_seed(0))
    plan = TrainingSettings(steps=6, batch_size=2, learning_rate=1e-2, checkpoint_every=2)

    def trained(checkpoint: Path | None = None, stop: int | None = None) -> list[torch.Tensor]:
        model = LocalModel("local", str(folder)).load(Spread.over("cuda", {0: "1000KB", 1: "4000KB"}))
        assert set(bytes_by_place(model.network)) == {"cuda:0", "cuda:1"}
        torch.manual_seed(0)
        network = Lora(plan, rank=2, dropout=0.3).trainable(model)
        told, count = objective_for(model), iter(range(100))

        def objective(*inputs: Any) -> Any:
            if next(count) == stop:
                raise _Interrupted
            return told(*inputs)

        states = [torch.cuda.get_rng_state(device) for device in range(2)]
        with nullcontext() if stop is None else pytest.raises(_Interrupted):
            train(network, windows, objective, plan, checkpoint=checkpoint)
        assert all(torch.equal(torch.cuda.get_rng_state(device), states[device]) for device in range(2))
        return [p.detach().cpu() for p in network.parameters() if p.requires_grad]

    whole = trained()
    trained(folder / "state", stop=5)
    assert all(torch.equal(a, b) for a, b in zip(trained(folder / "state"), whole, strict=True))


def test_a_training_over_two_is_resumed(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Bit for bit, dropout included; the random numbers of both are as before."""
    on_gpus(_resumed, matrix.write_model(tmp_path, "llama", tiny_tokenizer))
