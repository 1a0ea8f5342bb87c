"""The hub path against a local stand-in: a good download, refusals, a transfer cut off, and no server at all."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.hub import COMMIT, serving
from helpers.places import ROOT
from knowledge_compression.identity import CONTENT
from knowledge_compression.results.earlier import contents_of
from knowledge_compression.results.store import RunStore

# Runs in a process of its own, because the hub's client reads its address when it is imported.
CLIENT = """
import json, sys, time
from knowledge_compression.errors import BadInput
from knowledge_compression.models.loading import HubModel

for name in sys.argv[1:]:
    start = time.perf_counter()
    try:
        model = HubModel("tiny", name).load("cpu")
        total = float(sum(p.double().sum() for p in model.network.parameters()))
        result = {"sum": total, "vocabulary": len(model.tokenizer), "provenance": model.provenance}
        result["fingerprint"] = HubModel("tiny", name).fingerprint()
    except BadInput as error:
        result = {"line": str(error)}
    print(json.dumps(result | {"seconds": time.perf_counter() - start}))
"""


def load_in_process(endpoint: str, home: Path, *names: str) -> list[dict[str, Any]]:
    return run_client(CLIENT, endpoint, home, *names)


def run_client(program: str, endpoint: str, home: Path, *arguments: str) -> list[dict[str, Any]]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=clean | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> tuple[Path, float]:
    from helpers.networks import build_network

    folder = tmp_path_factory.mktemp("repository")
    network = build_network("llama")
    network.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder, float(sum(parameter.detach().double().sum() for parameter in network.parameters()))


@pytest.mark.slow
def test_a_good_download_refusals_a_transfer_cut_off_and_then_no_server(
    repository: tuple[Path, float], tmp_path: Path
) -> None:
    folder, total = repository
    there = {"models/me/tiny": folder, "models/me/cut": folder}
    with serving(there, cut=frozenset({"models/me/cut/model.safetensors"})) as endpoint:
        good, *failed = load_in_process(endpoint, tmp_path, "me/tiny", "locked/tiny", "me/nothing", "me/cut")
    assert good["sum"] == pytest.approx(total) and good["vocabulary"] > 50
    assert good["provenance"] == {"hub_id": "me/tiny", "revision": "main", "commit": COMMIT}
    assert good["fingerprint"] == f"me/tiny@{COMMIT}"  # and not that of a branch, which moves
    for refused, name in zip(failed, ("locked/tiny", "me/nothing", "me/cut"), strict=True):
        assert refused["line"].startswith(f"model=tiny: '{name}' is not in the cache and could not be downloaded (")
        assert "model=local model.path=DIR" in refused["line"] and "\n" not in refused["line"]
    assert not list(tmp_path.rglob("models--me--cut/snapshots/*/model.safetensors"))  # nothing half

    # The server is gone: what was downloaded still loads, what was not fails within moments.
    cached, absent, cut = load_in_process(endpoint, tmp_path, "me/tiny", "me/other", "me/cut")
    assert cached["sum"] == good["sum"] and cached["provenance"] == good["provenance"]
    assert cached["fingerprint"] == good["fingerprint"]
    for missing, name in ((absent, "me/other"), (cut, "me/cut")):
        assert f"'{name}' is not in the cache and the hub does not answer; give a local copy" in missing["line"]
        assert missing["seconds"] < 10  # the hub's own client goes on trying for 25 before it says so


def test_a_branch_that_moves_while_it_is_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run would bear the id of one commit and the answers of another."""
    from knowledge_compression.errors import ModelUnavailable
    from knowledge_compression.models import loading

    monkeypatch.setattr(loading, "commit_of", lambda *_: "a" * 40)
    monkeypatch.setattr(loading, "cached_commit", lambda *_: "b" * 40)
    with pytest.raises(ModelUnavailable, match=r"changed on the hub while it was read \(from a{40} to b{40}\)"):
        loading.HubModel("tiny", "me/tiny")._read_provenance()


def test_the_probe_takes_any_answer_and_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from knowledge_compression.models import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    with serving({}) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert hub.hub_answers.__wrapped__()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not hub.hub_answers.__wrapped__()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert not hub.hub_answers.__wrapped__()


# The same for text: C4's first shard as the hub names it, read by the corpus that calibration draws from.
TEXT_CLIENT = """
import json, sys
from knowledge_compression.corpora.c4 import C4
from knowledge_compression.errors import BadInput

try:
    print(json.dumps({"texts": list(C4(samples=1, length=8).documents().texts)}))
except BadInput as error:
    print(json.dumps({"line": str(error)}))
"""


@pytest.mark.slow
def test_a_data_set_is_downloaded_refused_and_then_read_from_the_cache(tmp_path: Path) -> None:
    from knowledge_compression.corpora.c4 import HUB_FILES, HUB_ID, TRAIN

    shard = tmp_path / "c4" / HUB_FILES[TRAIN]
    shard.parent.mkdir(parents=True)
    texts = ["The capital of France is Paris.", "Dogs are animals."]
    with gzip.open(shard, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)

    def read(endpoint: str, home: str) -> dict[str, Any]:
        return run_client(TEXT_CLIENT, endpoint, tmp_path / home)[0]

    with serving({f"datasets/{HUB_ID}": tmp_path / "c4"}) as endpoint:
        assert read(endpoint, "home") == {"texts": texts}
    with serving({}) as endpoint:
        refused = read(endpoint, "other_home")["line"]
    assert HUB_ID in refused and "corpus=self" in refused and "\n" not in refused


@pytest.mark.slow
def test_a_model_that_moved_on_the_hub_is_said_in_one_line(tmp_path: Path, tiny_folder: Path) -> None:
    """The cache as ``huggingface_hub`` lays it out: a branch's commit in ``refs``, files by commit in ``snapshots``."""
    cached = tmp_path / "home" / "hub" / "models--me--tiny"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "KC_CACHE_DIR": str(tmp_path / "cache")}
    given = ["model=olmo2_1b", "model.hub_id=me/tiny", "compression=none", "device=cpu", "eval=[latency]"]
    given += ["eval.latency.batch=1", "eval.latency.repeats=1", "eval.latency.decode_tokens=1"]
    given += [f"output.dir={tmp_path / 'out'}"]

    def run(*arguments: str) -> list[str]:
        command = [sys.executable, "run.py", *arguments, *given]
        done = subprocess.run(command, env=clean | settings, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [line for line in (done.stdout + done.stderr).splitlines() if "is now commit" in line]

    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(tiny_folder, cached / "snapshots" / commit)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text(commit)
        said = run("eval.latency.length=8")
        if commit[0] == "a":
            assert said == []
    (line,) = said
    assert "me/tiny@main is now commit bbbbbbbb" in line and "(aaaaaaaa in 1)" in line
    assert run("eval.latency.length=8") == []  # of what is there nothing new is made, and nothing said
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2
    (line,) = run("-m", "eval.latency.length=8,9")
    assert "(aaaaaaaa in 1)" in line


COMPRESSED = """
import json, sys
from knowledge_compression.models.loading import HubModel

model = HubModel("tiny", sys.argv[1]).load("cpu")
print(json.dumps({"format": model.on_disk.format, "bits": model.on_disk.bits, "provenance": model.provenance,
                  "weight": model.network.model.layers[1].mlp.up_proj.weight.flatten()[:9].tolist()}))
"""


def test_a_compressed_model_is_decoded(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from helpers.networks import build_network
    from knowledge_compression.compression.methods.rtn import Rtn
    from knowledge_compression.compression.writing.gptq import GptqWriter
    from knowledge_compression.models import Model, Target

    network = build_network("llama", hidden_size=64, intermediate_size=96, head_dim=32)
    model = Model(network, tiny_tokenizer, "llama")
    Rtn(bits=4, group_size=32, scale_bits=16).compress(model, Target("ff", ["ff"]).select(model), None)
    GptqWriter().write(model, tmp_path / "packed")
    with serving({"models/me/packed": tmp_path / "packed"}) as address:
        (found,) = run_client(COMPRESSED, address, tmp_path / "home", "me/packed")
    assert (found["format"], found["bits"], found["provenance"]["commit"]) == ("gptq", 4.0, COMMIT)
    assert found["weight"] == network.model.layers[1].mlp.up_proj.weight.flatten()[:9].tolist()


def test_settings_that_are_nested_too_deeply_name_no_model(tmp_path: Path) -> None:
    for levels, runs in ((50, 1), (150, 0)):
        folder = tmp_path / str(levels)
        (folder / "runs" / "one").mkdir(parents=True)
        named = f"model:\n  hub_id: me/tiny\n  revision: main\n  more: {'[' * levels + ']' * levels}\n"
        identity = f"identity:\n  model:\n    {CONTENT}: me/tiny@a\n"
        (folder / "runs" / "one" / "config.yaml").write_text(named + identity)
        assert contents_of(RunStore(folder), "me/tiny", "main").total() == runs
