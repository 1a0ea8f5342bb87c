"""What is written holds no secret, and what is read back is never a pickle."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import knowledge_compression
from helpers.experiments import SUITE, made
from knowledge_compression.compression.kept import KeptModels
from knowledge_compression.results.environment import environment
from knowledge_compression.results.secrets import hidden, is_secret, without_secrets
from knowledge_compression.results.store import RunStore
from knowledge_compression.results.tracker import NoTracker

PACKAGE = Path(knowledge_compression.__file__).parent
DATA = {".safetensors", ".json", ".yaml", ".parquet", ".png", ".npy", ".txt", ".jinja", ".model", ".lock"}
TOKEN = "hf_" + "a1B2" * 8


def test_environment_json_keeps_no_secret_of_the_command_line(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "swordfish")
    secret = [f"+hub_token={TOKEN}", "model.password=open", "+tracker.api_key=k", "note=swordfish", f"x=a{TOKEN}"]
    secret += ["--token", "opensesame", "url=https://me:mypass@host/x"]
    monkeypatch.setattr(sys, "argv", ["run.py", "target=att", "sparsity=0.2", *secret, "eval.lama.tokens=7"])
    run = made(tiny_folder, {"a": SUITE}).run(RunStore(tmp_path), NoTracker())
    assert run.folder is not None
    kept = (run.folder / "environment.json").read_text()
    for word in (TOKEN, "=open", "=k", "swordfish", "opensesame", "mypass"):
        assert word not in kept
    told = environment()["command"]
    assert told.startswith("run.py target=att sparsity=0.2 +hub_token=***") and told.endswith("eval.lama.tokens=7")


@given(st.lists(st.text("ab=-/.0123 _", max_size=12)))
def test_what_is_no_secret_stays_as_it_is(arguments: list[str]) -> None:
    assert without_secrets(arguments) == arguments


def test_secrets_are_known_by_name_by_shape_and_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "x9")
    assert (
        is_secret("model_hub_token", 1) and is_secret("a", TOKEN) and is_secret("a", "x9") and is_secret("a", "0f" * 20)
    )
    assert not is_secret("tokens", 7) and not is_secret("a", "0f" * 32)  # a digest of another length


def test_settings_lose_their_secrets_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "x9")
    monkeypatch.setenv("OTHER_TOKEN", "8")
    commit = "0a" * 20
    sound = {
        "model": {"revision": commit, "path": f"/hub/snapshots/{commit}", "content": f"a/b@{commit}", "stream": True}
    }
    sound |= {"tokens": 7, "eval": [{"limit": 8, "name": None}], "text": "a key: word", "digest": "0f" * 8}
    assert hidden(sound) == sound
    told = {"hub_token": 5, "deep": [{"api_key": "k", "ways": ["x9", TOKEN]}], "address": "https://me:mypass@host/x"}
    told |= {"setup": [f"export HF_TOKEN={TOKEN}", "export MY_PASSWORD='open sesame'; run", commit]}
    assert hidden(told) == {
        "hub_token": "***",
        "deep": [{"api_key": "***", "ways": ["***", "***"]}],
        "address": "https://***@host/x",
        "setup": ["export HF_TOKEN=***", "export MY_PASSWORD=***; run", "***"],
    }


def test_config_yaml_keeps_no_secret(tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / f"of-{TOKEN}"
    folder.symlink_to(tiny_folder)
    experiment = made(folder, {"a": SUITE})
    run = experiment.run(RunStore(tmp_path / "outputs"), NoTracker())
    assert run.folder is not None
    assert all(TOKEN.encode() not in path.read_bytes() for path in run.folder.iterdir())
    assert "of-***" in (run.folder / "config.yaml").read_text()
    assert run.id == made(tiny_folder, {"a": SUITE}).id


def test_nothing_in_the_package_reads_or_writes_a_pickle() -> None:
    """But for a launcher, which hands a job to a process of its own through a pipe."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in {"torch.load", "torch.save", "pickle.load", "pickle.loads", "pickle.dump", "joblib.load"}:
                found.add((path.name, called))
            if called == "np.load" and "allow_pickle=False" not in ast.unparse(node):
                found.add((path.name, called))
    assert found == {("local.py", "pickle.load")}


def test_what_a_run_leaves_is_data_alone(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle")

    for name in ("load", "save"):
        monkeypatch.setattr(f"torch.{name}", refuse)
    experiment = replace(made(tiny_folder, {"a": SUITE}), save_model=True, kept_models=KeptModels(1.0))
    store = RunStore(tmp_path / "outputs")
    experiment.run(store, NoTracker())
    replace(experiment, suites={"b": SUITE}).run(store, NoTracker())
    left = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert ".safetensors" in left and left <= DATA
