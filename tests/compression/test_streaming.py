"""A streamed compression gives what compression in memory gives, bit for bit, and survives being killed anywhere."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file

from helpers.layers import ALL, windows
from helpers.networks import MIXTURES, TINY, build_network, logits_of
from helpers.places import EXHAUSTIVE
from helpers.streaming import METHODS, streamed
from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.methods.hqq import Hqq
from knowledge_compression.compression.methods.int8_dynamic import Int8Dynamic
from knowledge_compression.compression.methods.magnitude import Magnitude
from knowledge_compression.compression.methods.nf4 import Nf4
from knowledge_compression.compression.methods.pipeline import Pipeline
from knowledge_compression.compression.methods.rtn import Rtn
from knowledge_compression.compression.methods.smoothquant import SmoothQuant
from knowledge_compression.corpora.own_samples import OwnSamples
from knowledge_compression.errors import BadInput, ModelUnavailable
from knowledge_compression.models import Model, Target
from knowledge_compression.models.loading import LocalModel
from knowledge_compression.models.saving import save_checkpoint
from knowledge_compression.sweeping.cli import main

# Groups that divide 16 and 24 inputs.
MIXTURES_BY = METHODS | {"rtn": Rtn(group_size=8)}
WITH_HEAD = Target("head", ["ff", "final"])
SHARDED = sorted(set(TINY) - {"albert"})
FAMILIES = ["llama", "bert", "t5", "gpt2", "opt"]
# A walk that reads text goes through every kind of block, a method by itself through what it has that others do not.
CALIBRATED = [
    (name, architecture)
    for i, name in enumerate(["gptq", "sparsegpt", "wanda", "awq", "rtn"])
    for architecture in FAMILIES
    if EXHAUSTIVE or name == "gptq" or architecture in (FAMILIES[i], "llama")
]
BANKS = [
    (name, method)
    for name in MIXTURES
    for method in ("magnitude", "gptq", "rtn")
    if EXHAUSTIVE or method == "gptq" or name in ("mixtral", "gpt_oss")
]


@pytest.fixture
def saved(tiny_tokenizer: object, tmp_path: Path) -> Callable[..., LocalModel]:
    """``saved(architecture)`` saves a tiny model of three blocks' worth of shards and gives where it lies."""

    def make(architecture: str, dtype: torch.dtype = torch.float32, **changes: object) -> LocalModel:
        model = Model(build_network(architecture, **changes).to(dtype), tiny_tokenizer, architecture)  # type: ignore[arg-type]
        folder = tmp_path / architecture
        model.network.save_pretrained(folder, max_shard_size="10KB")
        model.tokenizer.save_pretrained(folder)
        assert len(list(folder.glob("*.safetensors"))) > 1
        return LocalModel(architecture, str(folder), stream=True)

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def in_memory(source: LocalModel, compression: Compression, target: Target, folder: Path, dtype: str) -> Model:
    model = source.load("cpu", dtype)
    with torch.no_grad():
        compression.compress(model, target.select(model), windows(6, 16) if compression.calibrated else None)  # type: ignore[arg-type]
    save_checkpoint(model, folder)
    return model


MIXTURE = Target("all", ["decoder_self_att", "ff", "experts", "shared_experts"])


@pytest.mark.parametrize(
    ("architecture", "method"),
    [pytest.param(*case, marks=() if case[0] == "mixtral" else pytest.mark.slow) for case in BANKS],
)
def test_a_mixture_streams_to_what_it_becomes_in_memory(
    saved: Callable[..., LocalModel], tmp_path: Path, architecture: str, method: str
) -> None:
    """Whether its files hold banks of experts as they are, or each expert by itself."""
    source = saved(architecture)
    in_memory(source, MIXTURES_BY[method], MIXTURE, tmp_path / "one", "float32")
    report = streamed(source, MIXTURES_BY[method], MIXTURE, tmp_path / "two", "float32")
    assert {layer.role for layer in report.layers} >= {"experts"}
    assert_same(tmp_path / "one", tmp_path / "two")
    again = LocalModel("again", str(tmp_path / "two")).load("cpu", "float32")
    assert logits_of(again).isfinite().all()


def test_a_mixture_that_was_cut_off_goes_on(saved: Callable[..., LocalModel], tmp_path: Path) -> None:
    source = saved("mixtral")
    streamed(source, METHODS["gptq"], MIXTURE, tmp_path / "whole", "float32")
    streamed(source, METHODS["gptq"], MIXTURE, tmp_path / "part", "float32")
    for path in sorted((tmp_path / "part").glob("model-*"))[2:]:  # as if it had been killed after the first block
        path.unlink()
    notes = json.loads((tmp_path / "part" / "units.json").read_text())
    (tmp_path / "part" / "units.json").unlink()
    (tmp_path / "part" / "model-00001-of-00003.note").write_text("null")
    (tmp_path / "part" / "model-00002-of-00003.note").write_text(json.dumps(notes["model.layers.0"]))
    streamed(source, METHODS["gptq"], MIXTURE, tmp_path / "part", "float32")
    assert_same(tmp_path / "whole", tmp_path / "part")


def test_experts_that_are_not_all_there_are_refused(saved: Callable[..., LocalModel], tmp_path: Path) -> None:
    source = saved("mixtral")
    index = Path(source.path) / "model.safetensors.index.json"
    there = json.loads(index.read_text())
    gone = next(name for name in there["weight_map"] if ".experts.2." in name)
    del there["weight_map"][gone]
    index.write_text(json.dumps(there))
    with pytest.raises(BadInput, match=r"holds model\.layers\.0\..*experts\.0\..* and \d+ more of shape"):
        streamed(source, METHODS["rtn"], MIXTURE, tmp_path / "two", "float32")


def assert_same(one: Path, other: Path) -> None:
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "target"),
    [
        pytest.param(name, target, id=f"{name}-{said}")
        for i, name in enumerate(SHARDED)
        for j, (target, said) in enumerate([(ALL, "all"), (WITH_HEAD, "with_head")])
        if EXHAUSTIVE or name in FAMILIES or (i + j) % 2
    ],
)
def test_magnitude_is_the_same_streamed(
    architecture: str, target: Target, saved: Callable[..., LocalModel], tmp_path: Path
) -> None:
    source, method = saved(architecture), Magnitude(sparsity=0.4)
    model = in_memory(source, method, target, tmp_path / "memory", "float32")
    report = streamed(source, method, target, tmp_path / "streamed")
    assert_same(tmp_path / "streamed", tmp_path / "memory")
    assert report.sparsity == pytest.approx(0.4, abs=1e-3)
    again = LocalModel("again", str(tmp_path / "streamed")).load("cpu")
    assert torch.equal(logits_of(again), logits_of(model))
    plain = type(model.network).from_pretrained(tmp_path / "streamed", dtype=torch.float32).eval()
    assert torch.equal(logits_of(Model(plain, model.tokenizer, "plain")), logits_of(model))


@pytest.mark.parametrize(
    "method",
    [
        Magnitude(sparsity=0.3, scope="layer"),
        Magnitude(sparsity=0.5, pattern="2:4"),
        Nf4(block_size=16),
        Hqq(group_size=16),
    ],
    ids=lambda method: f"{type(method).__name__}",
)
def test_layerwise_methods_are_the_same_streamed(
    method: Compression, saved: Callable[..., LocalModel], tmp_path: Path
) -> None:
    source = saved("llama", torch.bfloat16)
    in_memory(source, method, ALL, tmp_path / "memory", "bfloat16")
    report = streamed(source, method, ALL, tmp_path / "streamed")
    assert_same(tmp_path / "streamed", tmp_path / "memory")
    assert len(report.layers) == 14
    assert {tensor.dtype for tensor in tensors(tmp_path / "streamed").values()} == {torch.bfloat16}


def test_ties_go_to_the_same_weights(saved: Callable[..., LocalModel], tmp_path: Path) -> None:
    """Where half of all weights have one magnitude, which of them go is decided by their order, across blocks too."""
    source = saved("llama")
    for path in Path(source.path).glob("*.safetensors"):
        save_file(
            {n: t.sign() * 0.5 if t.dim() == 2 else t for n, t in load_file(path).items()}, path, {"format": "pt"}
        )
    method = Magnitude(sparsity=0.7)
    in_memory(source, method, ALL, tmp_path / "memory", "float32")
    streamed(source, method, ALL, tmp_path / "streamed")
    assert_same(tmp_path / "streamed", tmp_path / "memory")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture"), CALIBRATED)
def test_calibrated_methods_are_the_same_streamed(
    name: str, architecture: str, saved: Callable[..., LocalModel], tmp_path: Path
) -> None:
    source, method = saved(architecture), METHODS[name]
    in_memory(source, method, ALL, tmp_path / "memory", "float32")
    report = streamed(source, method, ALL, tmp_path / "streamed")
    assert_same(tmp_path / "streamed", tmp_path / "memory")
    assert {layer.path for layer in report.layers} == {layer.path for layer in ALL.select(source.load("cpu"))}


class Killed(Exception):
    """Stands for the process's end."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["magnitude", "rtn", "gptq"])
@pytest.mark.parametrize("after", range(4))
def test_it_goes_on_behind_the_last_finished_unit(
    name: str, after: int, saved: Callable[..., LocalModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, method = saved("llama"), METHODS[name]
    report = streamed(source, method, WITH_HEAD, tmp_path / "whole")

    renames, rename = [], Path.rename

    def dying(self: Path, target: Path) -> Path:
        if target.suffix == ".safetensors":
            if len(renames) == after:
                raise Killed
            renames.append(target.name)
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", dying)
        streamed(source, method, WITH_HEAD, tmp_path / "resumed")
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "resumed").glob("*.safetensors")}
    assert len(written) == after
    resumed = streamed(source, method, WITH_HEAD, tmp_path / "resumed")
    for name, when in written.items():
        assert (tmp_path / "resumed" / name).stat().st_mtime_ns == when
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")
    assert [(r.path, r.removed, r.bits) for r in resumed.layers] == [(r.path, r.removed, r.bits) for r in report.layers]


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def stream(path: str, method: str, folder: Path) -> None:
    """Done in a process that is killed."""
    torch.set_num_threads(1)
    streamed(LocalModel("child", path, stream=True), METHODS[method], ALL, folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "gptq"])
def test_kill_minus_nine_at_any_moment(
    method: str, saved: Callable[..., LocalModel], tmp_path: Path, processes: Any
) -> None:
    source = saved("llama", num_hidden_layers=16, layer_types=None)
    streamed(source, METHODS[method], ALL, tmp_path / "whole")
    folder, kills = tmp_path / "killed", 0
    for wanted in (2, 6):
        child = processes.Process(target=stream, args=(source.path, method, folder))
        child.start()
        while child.is_alive() and len(list(folder.glob("*.safetensors"))) < wanted:
            time.sleep(0.0005)
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
    assert kills == 2
    streamed(source, METHODS[method], ALL, folder)
    left = {name: content for name, content in files(folder).items() if not name.endswith(".partial")}
    assert left == files(tmp_path / "whole")


def test_what_cannot_be_streamed_is_refused(saved: Callable[..., LocalModel], tmp_path: Path) -> None:
    source = saved("llama")
    for method in (Int8Dynamic(), SmoothQuant(), Pipeline([Magnitude(sparsity=0.2), Rtn()])):
        with pytest.raises(BadInput, match=f"compression={re.escape(method.name)} cannot be streamed"):
            streamed(source, method, ALL, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_broken_checkpoints_are_one_line(saved: Callable[..., LocalModel], tmp_path: Path) -> None:
    source = saved("bert")
    folder = Path(source.path)
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shards = sorted(folder.glob("*.safetensors"))

    index_file.write_text(
        json.dumps(index | {"weight_map": dict.fromkeys(index["weight_map"], "../secret.safetensors")})
    )
    with pytest.raises(ModelUnavailable, match="outside its folder"):
        source.streamed("cpu")
    short = dict(list(index["weight_map"].items())[:-2])
    index_file.write_text(json.dumps(index | {"weight_map": short}))
    with pytest.raises(BadInput, match="lacks the weight"):
        source.streamed("cpu")
    index_file.write_text(json.dumps(index))
    shards[-1].write_bytes(shards[-1].read_bytes()[:100])
    with pytest.raises(ModelUnavailable, match="is damaged or cut short"):
        streamed(source, Magnitude(sparsity=0.2), ALL, tmp_path / "out")
    for path in (*shards, index_file):
        path.unlink()
    with pytest.raises(ModelUnavailable, match="no safetensors weights"):
        source.streamed("cpu")


def test_nan_never_reaches_the_copy(saved: Callable[..., LocalModel], tmp_path: Path) -> None:
    source = saved("llama")
    path = next(
        p
        for p in sorted(Path(source.path).glob("*.safetensors"))
        if "model.layers.1.mlp.up_proj.weight" in load_file(p)
    )
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(BadInput, match=r"not finite \(model\.layers\.1\.mlp\.up_proj\.weight: 1\)"):
        streamed(source, Magnitude(sparsity=0.2, scope="layer"), ALL, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_one_block_used_many_times_is_not_streamed(saved: Callable[..., LocalModel]) -> None:
    with pytest.raises(BadInput, match="uses weights in several blocks"):
        saved("albert").streamed("cpu")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Run the command line in this process; gives its exit status."""

    def run(*arguments: str) -> int:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, f"output.dir={tmp_path / 'outputs'}"])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


@pytest.mark.slow
def test_the_command_line_streams(
    command: Callable[..., int], saved: Callable[..., LocalModel], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = saved("llama", torch.bfloat16)
    asked = ["model=local", f"model.path={source.path}", "model.stream=true", "sparsity=0.3", "target=all"]
    assert command(*asked, "eval=[]") == 0
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    in_memory(source, Magnitude(sparsity=0.3), ALL, tmp_path / "memory", "bfloat16")
    assert_same(folder / "model", tmp_path / "memory")
    report = json.loads((folder / "report.json").read_text())
    assert report["compression"]["sparsity"] == pytest.approx(0.3, abs=1e-3)
    assert len(json.loads((folder / "layers.json").read_text())) == 14

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
        assert command(*asked, "eval=[perplexity]") == 2
    assert "choose eval=[]" in capfd.readouterr().err
    assert command(*asked, "eval=[]", "compression=int8_dynamic") == 2
    assert "cannot be streamed" in capfd.readouterr().err


def test_the_models_own_samples_need_it_whole(saved: Callable[..., LocalModel]) -> None:
    with pytest.raises(BadInput, match="corpus=self needs the whole model"):
        OwnSamples(length=16).prepared(saved("llama").streamed("cpu"))
