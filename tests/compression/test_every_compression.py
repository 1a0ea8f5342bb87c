"""Every file of ``conf/compression``, run from the command line on one model of each family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.matrix import (
    CALIBRATED,
    COMPRESSIONS,
    PUTS_MODULES,
    SMALLER,
    WIDE,
    check,
    done,
    in_turn,
    linears,
    runs_in,
    shipped_compression,
    sweep,
    write_model,
    write_text,
)
from helpers.places import EXHAUSTIVE
from knowledge_compression.compression.methods.none import NoCompression

pytestmark = [pytest.mark.slow, pytest.mark.minutes]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=sorted(WIDE))
def folder(request: pytest.FixtureRequest, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of each family, saved as anybody saves one."""
    return write_model(tmp_path_factory.mktemp(request.param), request.param, tiny_tokenizer)


def test_every_compression_runs_and_its_model_is_read_back(folder: Path, data: Path, tmp_path: Path) -> None:
    outputs, names = tmp_path / "outputs", in_turn(COMPRESSIONS, folder.name)
    said = sweep(
        outputs, data, "model=local", f"model.path={folder}", "output.save_model=true",
        f"compression={','.join(names)}", "device=cpu",
    )  # fmt: skip
    assert f"{len(names)} runs done, 0 failed" in said
    runs = dict(runs_in(outputs))
    dense = runs.pop("none").metrics["perplexity.perplexity"]
    assert sorted(runs) == sorted(set(names) - {"none"})
    for name, run in runs.items():
        check(name, run, folder.name, "float32")
        if name != "ablation":  # which leaves nothing of any block
            assert 0.5 * dense < run.metrics["perplexity.perplexity"] < 2 * dense, name

    for name, run in runs.items():
        back = done(tmp_path / "again", outputs / "runs" / run.id / "model", data, NoCompression())
        if name not in PUTS_MODULES:  # weights come back as they were; activations rounded to int8 are no weights
            before, after = (one.metrics["perplexity.perplexity"] for one in (run, back))
            assert after == pytest.approx(before, rel=1e-5), name


@pytest.mark.parametrize("name", SMALLER)
def test_a_smaller_network_is_asked_and_read_back(name: str, folder: Path, data: Path, tmp_path: Path) -> None:
    if name not in in_turn(SMALLER, folder.name):
        pytest.skip("tried on another family (KC_TEST_EXHAUSTIVE=1 tries it on all)")
    outputs, again = tmp_path / "outputs", tmp_path / "again"
    target, sparsity = {"depth": ("all", 0.2), "width": ("ff", 0.5)}[name]  # a fifth of two blocks is one
    sweep(
        outputs, data, "model=local", f"model.path={folder}", "output.save_model=true", f"compression={name}",
        target=target, sparsity=sparsity,
    )  # fmt: skip
    ((_, run),) = ((chosen, run) for chosen, run in runs_in(outputs) if chosen == name)
    assert run.report["compression"]["sparsity"] == pytest.approx(0.5, abs=0.02)
    saved = outputs / "runs" / run.id / "model"
    before, after = (sum(file.stat().st_size for file in place.glob("*.safetensors")) for place in (folder, saved))
    assert after < before
    sweep(again, data, "model=local", f"model.path={saved}", "compression=none")
    ((_, read),) = runs_in(again)
    assert read.metrics["perplexity.perplexity"] == pytest.approx(run.metrics["perplexity.perplexity"], rel=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_compression_runs_on_narrower_checkpoints(dtype: str, folder: Path, data: Path, tmp_path: Path) -> None:
    """As a GPU loads them by default."""
    narrow = {name: ("float16", "bfloat16")[i % 2] for i, name in enumerate(COMPRESSIONS) if name != "none"}
    for name in in_turn(list(narrow), folder.name, 1):  # another family than that of the command line
        if EXHAUSTIVE or narrow[name] == dtype:
            check(name, done(tmp_path, folder, data, shipped_compression(name), dtype), folder.name, dtype)


def test_every_calibrated_compression_runs_on_both_kinds_of_passes(folder: Path, data: Path, tmp_path: Path) -> None:
    """Bfloat16 forward passes are what ``auto`` takes on a GPU or with AMX, float32 ones elsewhere."""
    for name in in_turn(CALIBRATED, folder.name):
        found = []
        for dtype in ("bfloat16", "float32"):
            compression = replace(shipped_compression(name), forward_dtype=dtype)
            run = done(tmp_path, folder, data, compression)
            check(name, run, folder.name, "float32")
            found.append(run.metrics["perplexity.perplexity"])
        one, other = found
        assert one != other, name
        assert one == pytest.approx(other, rel=0.3), name  # a few hundred tokens of a random network


def test_packed_models_hold_the_codes_that_their_method_says(folder: Path, data: Path, tmp_path: Path) -> None:
    names, outputs = in_turn(["rtn", "gptq"], folder.name), tmp_path / "outputs"
    if not names:
        pytest.skip("tried on other families (KC_TEST_EXHAUSTIVE=1 tries it on all)")
    sweep(
        outputs, data, "model=local", f"model.path={folder}", f"compression={','.join(names)}",
        "compression.scale_bits=16",
        "compression.group_size=32", "output.save_model=gptq",
    )  # fmt: skip
    for name, run in runs_in(outputs):
        if name == "none":
            continue
        packed = load_file(outputs / "runs" / run.id / "model" / "model.safetensors")
        for path, weights in linears(folder.name).items():
            words = packed[f"{path}.qweight"]
            assert words.dtype == torch.int32 and words.numel() * 8 == weights  # eight codes of four bits a word
            assert packed[f"{path}.scales"].isfinite().all() and f"{path}.weight" not in packed
