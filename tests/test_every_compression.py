"""Every file of ``conf/compression``, run from the command line on one model of each family."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.networks import WORDS, build_network
from helpers.shipped import shipped
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.sweeping.cli import CONF

pytestmark = pytest.mark.slow

COMPRESSIONS = [choice.partition("=")[2] for choice in shipped("compression")]
CALIBRATED = ["gptq", "sparsegpt", "wanda", "awq", "smoothquant", "int8_static"]
PUTS_MODULES = ["int8_dynamic", "prune_int8", "int8_static", "smoothquant"]
# Wide enough for the shipped group sizes of 64 and 128.
WIDE: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 128, "intermediate_size": 256},
    "t5": {"d_model": 128, "d_kv": 64, "d_ff": 256},
    "llama": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_key_value_heads": 2},
}
BITS = {"int8_dynamic": 8, "prune_int8": 8, "int8_static": 8, "smoothquant": 8} | dict.fromkeys(
    ["rtn", "gptq", "awq", "nf4", "hqq"], 4
)
SPARSE = ["magnitude", "random", "structured", "sparsegpt", "wanda", "prune_int8"]
SPARSITY = 0.25


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to calibrate on and to be asked about, where ``data_dir`` has it."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (4000,), generator=generator).tolist()]
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "test.raw.txt").write_text(" ".join(words[:600]) + "\n")
    (folder / "calibration.txt").write_text("\n".join(" ".join(words[i : i + 40]) for i in range(0, 4000, 40)))
    return folder


@pytest.fixture(scope="module", params=sorted(WIDE))
def folder(request: pytest.FixtureRequest, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of each family, saved as anybody saves one."""
    folder = tmp_path_factory.mktemp(request.param) / request.param
    build_network(request.param, **WIDE[request.param]).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def sweep(outputs: Path, data: Path, *choices: str, ends: int = 0) -> str:
    """What a user types; gives what the terminal shows."""
    command = [sys.executable, str(CONF.parent / "run.py"), "-m", "target=all", f"sparsity={SPARSITY}"]
    command += ["corpus=text", f"corpus.path={data / 'calibration.txt'}", "corpus.samples=6", "corpus.length=24"]
    command += ["eval=[perplexity]", "eval.perplexity.window=24", "eval.perplexity.masked_per_window=4", "limit=4"]
    command += [f"data_dir={data}", f"output.dir={outputs}", *choices]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=outputs.parent)
    assert ended.returncode == ends, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout + ended.stderr


def runs_in(outputs: Path) -> Iterator[tuple[str, Run]]:
    for run in RunStore(outputs):
        yield run.config["choices"]["compression"], run


def linears(architecture: str) -> dict[str, int]:
    """The linear layers of the blocks and their weights, counted without the product's family map."""
    network = build_network(architecture, **WIDE[architecture])
    heads = ("lm_head", "cls.", "shared")
    return {
        path: module.weight.numel()
        for path, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and not path.startswith(heads)
    }


def check(name: str, run: Run, architecture: str, dtype: str) -> None:
    """The figures of a run make sense."""
    report = run.report["compression"]
    expected = linears(architecture)
    touched = {layer["path"]: layer["parameters"] for layer in run.layers}
    assert touched == expected, name
    for layer in run.layers:  # transformers keeps T5's wo in float32 where all else is loaded in float16
        wide = dtype == "float32" or (architecture == "t5" and dtype == "float16" and layer["path"].endswith("wo"))
        assert layer["bits"] == BITS.get(name, 32 if wide else 16), (name, layer)
    assert report["sparsity"] == pytest.approx(SPARSITY if name in SPARSE else 0.0, abs=0.02), name
    assert report["parameters_touched"] == sum(expected.values())
    assert not set(report["fallbacks"]) - {"dead_input"}, name
    assert 0 < report["stored_bytes"] <= report["memory_bytes_before"] * 1.05
    assert all(math.isfinite(value) for value in run.metrics.values()), name
    for layer in run.layers:
        if name in ("gptq", "sparsegpt", "awq"):
            assert 0 < layer["error_after"] < 1 and layer["error_before"] > 0, (name, layer)
    assert bool(report.get("calibration")) == (name in CALIBRATED)


def test_every_compression_runs_and_its_model_is_read_back(folder: Path, data: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    said = sweep(
        outputs, data, "model=local", f"model.path={folder}", "output.save_model=true",
        f"compression={','.join(COMPRESSIONS)}", "device=cpu",
    )  # fmt: skip
    assert f"{len(COMPRESSIONS)} runs done, 0 failed" in said
    runs = dict(runs_in(outputs))
    assert sorted(runs) == sorted(COMPRESSIONS)
    dense = runs.pop("none").metrics["perplexity.perplexity"]
    for name, run in runs.items():
        check(name, run, folder.name, "float32")
        assert 0.5 * dense < run.metrics["perplexity.perplexity"] < 2 * dense, name

    again = tmp_path / "again"
    paths = ",".join(str(outputs / "runs" / run.id / "model") for run in runs.values())
    sweep(again, data, "model=local", f"model.path={paths}", "compression=none")
    back = sorted(run.metrics["perplexity.perplexity"] for _, run in runs_in(again))
    first = sorted({run.metrics["perplexity.perplexity"] for name, run in runs.items() if name not in PUTS_MODULES})
    assert len(back) >= len(first)
    for value in first:  # weights come back as they were, to the bit; only activations rounded to int8 are no weights
        assert min(abs(value - other) for other in back) <= 1e-5 * value


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_compression_runs_on_narrower_checkpoints(folder: Path, data: Path, tmp_path: Path, dtype: str) -> None:
    """As a GPU loads them by default."""
    outputs = tmp_path / "outputs"
    said = sweep(
        outputs, data, "model=local", f"model.path={folder}", f"compression={','.join(COMPRESSIONS)}", f"dtype={dtype}"
    )
    assert f"{len(COMPRESSIONS)} runs done, 0 failed" in said
    for name, run in runs_in(outputs):
        if name != "none":
            check(name, run, folder.name, dtype)


def test_every_calibrated_compression_runs_on_both_kinds_of_passes(folder: Path, data: Path, tmp_path: Path) -> None:
    """Bfloat16 forward passes are what ``auto`` takes on a GPU or with AMX, float32 ones elsewhere."""
    outputs = tmp_path / "outputs"
    sweep(
        outputs, data, "model=local", f"model.path={folder}", f"compression={','.join(CALIBRATED)}",
        "compression.forward_dtype=bfloat16,float32",
    )  # fmt: skip
    found: dict[str, list[float]] = {}
    for name, run in runs_in(outputs):
        if name != "none":
            check(name, run, folder.name, "float32")
            found.setdefault(name, []).append(run.metrics["perplexity.perplexity"])
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(CALIBRATED, 2)
    for name, (one, other) in found.items():
        assert one == pytest.approx(other, rel=0.15), name  # a few hundred tokens of a random network


def test_packed_models_hold_the_codes_that_their_method_says(folder: Path, data: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    sweep(
        outputs, data, "model=local", f"model.path={folder}", "compression=rtn,gptq", "compression.scale_bits=16",
        "compression.group_size=32", "output.save_model=packed",
    )  # fmt: skip
    for name, run in runs_in(outputs):
        if name == "none":
            continue
        packed = load_file(outputs / "runs" / run.id / "model" / "model.safetensors")
        for path, weights in linears(folder.name).items():
            words = packed[f"{path}.qweight"]
            assert words.dtype == torch.int32 and words.numel() * 8 == weights  # eight codes of four bits a word
            assert packed[f"{path}.scales"].isfinite().all() and f"{path}.weight" not in packed
