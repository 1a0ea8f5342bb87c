"""Every file of ``conf/recovery``, run from the command line on one model of each family, and in every type."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import commands
from helpers.networks import WORDS, build_network
from helpers.places import EXHAUSTIVE
from helpers.shipped import shipped
from knowledge_compression.analysis.ledger import restores_by
from knowledge_compression.results.store import RunStore
from knowledge_compression.sweeping.cli import CONF

pytestmark = [pytest.mark.slow, pytest.mark.minutes]

RECOVERIES = [choice.partition("=")[2] for choice in shipped("recovery") if choice != "recovery=adapter"]
DECODERS_ONLY = ["concat", "idp", "prefix"]
WAYS = dict.fromkeys(["prompt", "prefix", "idp", "concat"], "redirection") | {"lora": "weights", "none": "nothing"}
# The types of the weights and of the products in scoring, and those that each family is tried in by default. Narrower
# weights are scored as they are.
TYPES = [("float32", "model"), ("float32", "bfloat16"), ("float16", "model"), ("bfloat16", "model")]
TYPES_ON = {"bert": TYPES[:1], "t5": TYPES[2:3], "llama": TYPES[::3], "mixtral": TYPES[1:2]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to train on and to be asked about."""
    folder = tmp_path_factory.mktemp("data")
    words = [WORDS[(7 * i + i // 11) % len(WORDS)] for i in range(4000)]
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "test.raw.txt").write_text(" ".join(words[:600]) + "\n")
    (folder / "text.txt").write_text("\n".join(" ".join(words[i : i + 40]) for i in range(0, 4000, 40)))
    return folder


@pytest.fixture(scope="module", params=["bert", "t5", "llama", "mixtral"])
def folder(request: pytest.FixtureRequest, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family, saved as anybody saves one."""
    folder = tmp_path_factory.mktemp(request.param) / request.param
    build_network(request.param).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def kc(
    folder: Path, data: Path, outputs: Path, *choices: str, flags: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """What a user types, on one thread."""
    command = [str(CONF.parent / "run.py"), *flags, "model=local", f"model.path={folder}", "device=cpu"]
    command += ["compression=magnitude", "target=all", "sparsity=0.25", "corpus=text", "corpus.length=16"]
    command += [f"corpus.path={data / 'text.txt'}", "+budget.tokens=256", "+budget.epochs=10"]
    command += ["eval=[perplexity]", "eval.perplexity.window=16", "eval.perplexity.masked_per_window=2", "limit=3"]
    command += [f"data_dir={data}", f"output.dir={outputs}", *choices]
    return commands.run(*command, folder=outputs.parent, environment=os.environ | {"OMP_NUM_THREADS": "1"})


def test_every_recovery_runs_in_every_type(folder: Path, data: Path, tmp_path: Path) -> None:
    decoder = folder.name in ("llama", "mixtral")
    fit = [name for name in RECOVERIES if decoder or name not in DECODERS_ONLY]
    types = TYPES if EXHAUSTIVE else TYPES_ON[folder.name]
    grids = ", ".join(f"{{dtype: {dtype}, scoring_dtype: {scoring}}}" for dtype, scoring in types)
    outputs = tmp_path / "outputs"
    ended = kc(folder, data, outputs, f"recovery={','.join(fit)}", f"hydra.sweeper.grids=[{grids}]", flags=["-m"])
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stdout + ended.stderr
    runs = [run for run in RunStore(outputs) if run.config["choices"]["compression"] != "none"]
    found = {(run.config["choices"]["recovery"], run.config["dtype"], run.config["scoring_dtype"]) for run in runs}
    assert found == {(name, *way) for name in fit for way in types}
    for run in runs:
        name = run.config["choices"]["recovery"]
        assert restores_by(run) == run.report["recovery"]["restores_by"] == WAYS[name]
        assert run.environment["dtype"] == f"torch.{run.config['dtype']}"
        assert (run.report["recovery"]["trainable_parameters"] > 0) is (name != "none")
        assert run.void == {} and all(map(math.isfinite, run.metrics.values())), (name, run.config["dtype"])
        assert ("chosen_prompts" in run.items.columns) is (name == "idp")
        if name == "idp":
            assert run.items["chosen_prompts"].null_count() == 0
    for name in fit:  # a type rounds, and does not make another model
        values = [run.metrics["perplexity.nats_per_token"] for run in runs if run.config["choices"]["recovery"] == name]
        assert max(values) - min(values) < 0.1 * max(values), (name, values)


@pytest.mark.parametrize("name", DECODERS_ONLY)
def test_a_recovery_that_does_not_fit_is_one_line(folder: Path, data: Path, tmp_path: Path, name: str) -> None:
    if folder.name in ("llama", "mixtral"):
        pytest.skip("fits")
    if not EXHAUSTIVE and folder.name != ("t5" if name == "prefix" else "bert"):
        pytest.skip("tried on the other family (KC_TEST_EXHAUSTIVE=1 tries it on both)")
    ended = kc(folder, data, tmp_path / "outputs", f"recovery={name}")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "reads in both directions" in line and "recovery=prompt and recovery=lora fit" in line


def test_a_users_file_is_filed_as_its_class_restores(data: Path, folder: Path, tmp_path: Path) -> None:
    if not EXHAUSTIVE and folder.name != "llama":
        pytest.skip("tried on another family (KC_TEST_EXHAUSTIVE=1 tries it on all)")
    mine = tmp_path / "my_conf" / "recovery"
    mine.mkdir(parents=True)
    (mine / "prompt_of_mine.yaml").write_text("defaults: [lora, _self_]\nrank: 2\n")
    flags = ["--config-dir", str(mine.parent)]
    ended = kc(folder, data, tmp_path / "outputs", "recovery=prompt_of_mine", flags=flags)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    runs = [run for run in RunStore(tmp_path / "outputs") if run.config["choices"]["compression"] != "none"]
    assert [restores_by(run) for run in runs] == ["weights"]
