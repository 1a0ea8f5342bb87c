"""Every shipped compression on a model of each family, run as a user runs it, and what its figures must be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import knowledge_compression as kc
from helpers import commands
from helpers.networks import WORDS, build_network
from helpers.places import EXHAUSTIVE
from helpers.shipped import shipped
from knowledge_compression.compression.base import Compression
from knowledge_compression.corpora.text import TextFile
from knowledge_compression.evaluation.perplexity import Perplexity
from knowledge_compression.experiment import Experiment
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.recovery.none import NoRecovery
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.results.tracker import NoTracker
from knowledge_compression.sweeping.cli import CONF

# Those that take every family, compress by themselves and leave the network's shape; for rotate see test_rotate.py.
SMALLER = ["depth", "width"]
COMPRESSIONS = [
    name for choice in shipped("compression") if (name := choice.partition("=")[2]) not in ("rotate", *SMALLER)
]
CALIBRATED = ["gptq", "gptaq", "autoround", "scales", "imatrix", "sparsegpt", "wanda", "awq", "smoothquant"]
CALIBRATED += ["int8_static", "alps"]
PUTS_MODULES = ["int8_dynamic", "prune_int8", "int8_static", "smoothquant"]
# Wide enough for the shipped group sizes of 64 and 128.
WIDE: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 128, "intermediate_size": 256},
    "t5": {"d_model": 128, "d_kv": 64, "d_ff": 256},
    "llama": {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_key_value_heads": 2},
}
QUICK: dict[str, dict[str, Any]] = {"autoround": {"steps": 10}}
BITS = {"int8_dynamic": 8, "prune_int8": 8, "int8_static": 8, "smoothquant": 8, "fp8": 8} | dict.fromkeys(
    ["rtn", "gptq", "gptaq", "autoround", "scales", "awq", "nf4", "hqq", "gguf", "imatrix", "mxfp4", "nvfp4"], 4
)
SPARSITY = 0.25
REMOVED = dict.fromkeys(["magnitude", "random", "structured", "sparsegpt", "alps", "wanda", "prune_int8"], SPARSITY)
REMOVED["ablation"] = 1.0


def elsewhere(name: str) -> float:
    """The share by which the perplexity after a compression may differ on another device.

    Over calibration text, one weight that is rounded to the other side changes all later ones.
    """
    return 5e-2 if name in CALIBRATED else 5e-3


def write_text(folder: Path) -> Path:
    """Text to calibrate on and to be asked about, where ``data_dir`` has it; gives the folder."""
    generator = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (4000,), generator=generator).tolist()]
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "test.raw.txt").write_text(" ".join(words[:600]) + "\n")
    (folder / "calibration.txt").write_text("\n".join(" ".join(words[i : i + 40]) for i in range(0, 4000, 40)))
    return folder


def write_model(folder: Path, architecture: str, tokenizer: Any) -> Path:
    """A small model of an architecture, saved as anybody saves one; gives its folder."""
    build_network(architecture, **WIDE[architecture]).save_pretrained(folder / architecture)
    tokenizer.save_pretrained(folder / architecture)
    return folder / architecture


def sweep(
    outputs: Path, data: Path, *choices: str, ends: int = 0, target: str = "all", sparsity: float = SPARSITY
) -> str:
    """What a user types; gives what the terminal shows.

    It asks for perplexity where the choices name no suite, and calibrates on the text where they name no corpus.
    """
    command = [str(CONF.parent / "run.py"), "-m", f"target={target}", f"sparsity={sparsity}"]
    if not any(choice.startswith("corpus=") for choice in choices):
        command += ["corpus=text", f"corpus.path={data / 'calibration.txt'}"]
    command += ["corpus.samples=6", "corpus.length=24"]
    if not any(choice.startswith("eval=") for choice in choices):
        command += ["eval=[perplexity]", "eval.perplexity.window=24", "eval.perplexity.masked_per_window=4", "limit=4"]
    command += [f"data_dir={data}", f"output.dir={outputs}", *choices]
    ended = commands.run(*command, folder=outputs.parent)
    assert ended.returncode == ends, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout + ended.stderr


@cache
def shipped_compression(name: str) -> Compression:
    """What ``compression=NAME`` describes, at the sparsity of :func:`sweep`; tuning takes fewer steps."""
    made: Compression = kc.choose(f"compression={name}", sparsity=SPARSITY, **QUICK.get(name, {}))
    return made


def done(outputs: Path, folder: Path, data: Path, compression: Compression, dtype: str = "auto") -> Run:
    """What a run of :func:`sweep` does, without Hydra and in this process, so as any plain processor does it.

    Its map of the layers, a third of its time, is drawn in the runs of the command line alone.
    """
    text = str(data / "calibration.txt")
    experiment = Experiment(
        source=LocalModel("local", str(folder)),
        target=_chosen("target=all"),
        compression=compression,
        recovery=NoRecovery(),
        corpus=TextFile(name="text", path=text, samples=6, length=24),
        suites={"perplexity": Perplexity(window=24, masked_per_window=4, limit=4, data_dir=str(data))},
        device="cpu",
        dtype=dtype,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("knowledge_compression.running.layer_map", lambda report: b"")
        return experiment.run(RunStore(outputs), NoTracker())


_chosen = cache(kc.choose)


def in_turn(names: Sequence[str], family: str, ahead: int = 0) -> list[str]:
    """The share of the names that falls to a family, so that each is tried on one; all where tests are exhaustive.

    What is ``ahead`` by 1 falls to the family after, so that two tests try a name on two families.
    """
    families = sorted(WIDE)
    return list(names if EXHAUSTIVE else names[(families.index(family) + ahead) % len(families) :: len(families)])


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
        falls_back = name in ("gguf", "imatrix") and layer["fallbacks"] == [
            "q5_0_for_q4_k"
        ]  # rows of less than 256 inputs
        assert layer["bits"] == (5 if falls_back else BITS.get(name, 32 if wide else 16)), (name, layer)
    assert report["sparsity"] == pytest.approx(REMOVED.get(name, 0.0), abs=0.02), name
    assert report["parameters_touched"] == sum(expected.values())
    assert not set(report["fallbacks"]) - {"dead_input", "q5_0_for_q4_k", "no_place_for_factors"}, name
    assert 0 < report["stored_bytes"] <= report["memory_bytes_before"] * 1.05
    assert all(math.isfinite(value) for value in run.metrics.values()), name
    for layer in run.layers:
        if name in ("gptq", "gptaq", "autoround", "sparsegpt", "alps", "awq"):
            assert 0 < layer["error_after"] < 1 and layer["error_before"] > 0, (name, layer)
    assert bool(report.get("calibration")) == (name in CALIBRATED)
