"""A model is what its files hold: one byte makes another model, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM

from knowledge_compression import cache
from knowledge_compression.cache import cached_folder, file_digest
from knowledge_compression.errors import DataUnavailable, ModelUnavailable
from knowledge_compression.models.content import folder_fingerprint
from knowledge_compression.models.loading import LocalModel, PackagedGguf, PackagedModel


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["KC_CACHE_DIR"])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A model in shards, with every kind of file beside them."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    network = AutoModelForMaskedLM.from_pretrained(tiny_folder)
    network.save_pretrained(folder, max_shard_size="10KB")
    for path in tiny_folder.glob("tokenizer*"):
        shutil.copy(path, folder)
    for name in ("chat_template.jinja", "vocab.txt", "spiece.model", "weights.gguf", "modeling_own.py", "unheard.of"):
        (folder / name).write_text(f"the content of {name}")
    for name in ("README.md", "optimizer.pt", ".gitattributes", "flax_model.msgpack"):
        (folder / name).write_text("not read by any loader")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "model.safetensors").write_text("another model")
    return folder


def deciding(folder: Path) -> list[Path]:
    unread = {"README.md", "optimizer.pt", ".gitattributes", "flax_model.msgpack"}
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in unread)


@settings(max_examples=60)
@given(data=st.data())
def test_two_models_that_differ_in_one_byte_never_share_a_fingerprint(data: st.DataObject, sharded: Path) -> None:
    """Whichever byte of whichever file, its times set back as they were."""
    path = data.draw(st.sampled_from(deciding(sharded)))
    at = data.draw(st.integers(0, path.stat().st_size - 1))
    flip = data.draw(st.integers(1, 255))
    before, times, content = folder_fingerprint(sharded), path.stat(), path.read_bytes()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([content[at] ^ flip]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    try:
        assert folder_fingerprint(sharded) != before
    finally:
        path.write_bytes(content)
    assert folder_fingerprint(sharded) == before


def test_a_byte_far_into_a_large_file_counts(tmp_path: Path) -> None:
    """The fingerprint once read one MiB in 64."""
    (tmp_path / "model.safetensors").write_bytes(bytes(80 << 20))
    before = folder_fingerprint(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(40 << 20)
        file.write(b"x")
    assert folder_fingerprint(tmp_path) != before


def test_what_no_loader_reads_and_where_the_folder_lies_make_no_other_model(sharded: Path, tmp_path: Path) -> None:
    before = folder_fingerprint(sharded)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(sharded, elsewhere)
    (elsewhere / "README.md").write_text("more words")
    (elsewhere / "checkpoint-500" / "model.safetensors").write_text("trained further")
    assert folder_fingerprint(elsewhere) == before
    (elsewhere / "vocab.txt").rename(elsewhere / "vocabulary.txt")
    assert folder_fingerprint(elsewhere) != before


def test_shards_that_an_index_names_count_wherever_they_lie(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = next(iter(content["weight_map"].values()))
    (folder / "deeper").mkdir()
    (folder / shard).rename(folder / "deeper" / shard)
    where = {name: f"deeper/{file}" if file == shard else file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content | {"weight_map": where}))
    before = folder_fingerprint(folder)
    (folder / "deeper" / shard).write_bytes(bytes(3))
    assert folder_fingerprint(folder) != before


def test_the_run_of_a_model_is_another_where_a_weight_is(tiny_folder: Path, tmp_path: Path) -> None:
    """The false answer of old: the encoder zeroed, and yet the run of the good model."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    source = LocalModel("mine", str(folder))
    before = source.fingerprint()
    network = AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        network.bert.encoder.layer[0].output.dense.weight.zero_()
    network.save_pretrained(folder)
    assert source.fingerprint() != before


def test_a_file_is_read_once_and_again_when_it_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "file", list[Path]()
    path.write_bytes(b"some content")
    monkeypatch.setattr(cache, "_SETTLED", -1.0)  # as if it had lain there for long
    monkeypatch.setattr(cache, "_read", lambda path, really=cache._read: read.append(path) or really(path))
    first = file_digest(path)
    assert file_digest(path) == first and len(read) == 1
    times = path.stat()
    path.write_bytes(b"some CONTENT")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and time of modification as before
    second = file_digest(path)
    assert second != first and len(read) == 2
    other = tmp_path / "other"
    other.write_bytes(b"some content")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)  # another file under the same name: told by its inode
    assert file_digest(path) == first and len(read) == 3


def test_a_file_that_has_just_been_written_is_not_remembered(tmp_path: Path, own_cache: Path) -> None:
    """A second write may leave all its times as they are."""
    (tmp_path / "file").write_text("a")
    file_digest(tmp_path / "file")
    assert not any(str(tmp_path / "file") in path.read_text() for path in (own_cache / "digests").glob("*.json"))


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("first")

    def read(path: Path, really: Any = cache._read) -> str:
        found = really(path)
        if path.read_text() == "first":
            path.write_text("second, and longer")
        return str(found)

    monkeypatch.setattr(cache, "_read", read)
    found = file_digest(path)
    assert found == file_digest(path) == cache._read(path)


@pytest.mark.parametrize(
    "broken", [b"", b"{", b"[]", b"null", b'{"digest": 3}', b'{"file": {}, "digest": "short"}', b"\xff"]
)
def test_a_broken_record_is_not_believed(
    broken: bytes, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_SETTLED", -1.0)
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "file"
    path.write_text("content")
    right = file_digest(path)
    (record,) = (tmp_path / "cache" / "digests").iterdir()
    record.write_bytes(broken)
    assert file_digest(path) == right


def test_a_cache_that_takes_nothing_costs_another_reading_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_SETTLED", -1.0)
    (tmp_path / "file").write_text("content")
    assert file_digest(tmp_path / "file") == cache._read(tmp_path / "file")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    from knowledge_compression.corpora.corpus import digest_file

    with pytest.raises(ModelUnavailable, match="nothing cannot be read"):
        folder_fingerprint(tmp_path / "nothing")
    with pytest.raises(DataUnavailable, match="nothing cannot be read"):
        digest_file(tmp_path / "nothing")


def test_a_package_is_what_is_installed_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "kc_carrier"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_text("weights")
    (package / "weights.gguf").write_text("weights")
    monkeypatch.syspath_prepend(tmp_path)
    sources = [
        PackagedModel("mine", "kc_carrier", "kc-carrier==1.0", "model"),
        PackagedGguf("mine", "kc_carrier", "kc-carrier==1.0", "weights.gguf"),
    ]
    before = [source.fingerprint() for source in sources]
    assert all(one.startswith("kc-carrier==1.0:") for one in before)
    (package / "model" / "model.safetensors").write_text("others!")
    (package / "weights.gguf").write_text("others!")
    assert not set(before) & {source.fingerprint() for source in sources}


class Made:
    """Fills a folder of the cache, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, folder: Path) -> None:
        self.count += 1
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(bytes(range(256)))
        (folder / "about.json").write_text("{}")


def cut(folder: Path) -> None:
    os.truncate(folder / "inner" / "weights", 100)


def flip(folder: Path) -> None:
    (folder / "inner" / "weights").write_bytes(bytes(256))


def lose(folder: Path) -> None:
    (folder / "about.json").unlink()


def add(folder: Path) -> None:
    (folder / "more").touch()


def forget(folder: Path) -> None:
    (folder / cache.MADE).unlink()


def halve(folder: Path) -> None:
    (folder / cache.MADE).write_text((folder / cache.MADE).read_text()[:20])


@pytest.mark.parametrize("harm", [cut, flip, lose, add, forget, halve])
def test_a_folder_of_the_cache_that_is_not_what_was_made_is_made_again(harm: Any, request: Any) -> None:
    made, name = Made(), f"things/{request.node.name}"
    folder = cached_folder(name, made)
    assert cached_folder(name, made) == folder and made.count == 1
    harm(folder)
    cached_folder(name, made)
    assert made.count == 2 and (folder / "inner" / "weights").read_bytes() == bytes(range(256))
    assert cached_folder(name, made) == folder and made.count == 2


def test_a_folder_of_the_cache_under_another_name_is_not_believed() -> None:
    made = Made()
    folder = cached_folder("things/one", made)
    shutil.copytree(folder, folder.with_name("two"))
    cached_folder("things/two", made)
    assert made.count == 2
