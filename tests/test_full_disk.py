"""A disk without room: one line that names the place and the reason, and nothing computed is lost."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from knowledge_compression.cache import CacheUnwritable, cached_folder, kept_finding
from knowledge_compression.writing import no_room, write_table


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Every file that grows above this many bytes is an error of the system, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_full_disk_is_recognised_whichever_library_writes(tmp_path: Path) -> None:
    numbers = torch.arange(1000.0)
    with no_file_above(100):
        for write in (
            lambda path: path.write_bytes(b"0" * 1000),
            lambda path: write_table(pl.DataFrame({"a": numbers.tolist()}), path),
            lambda path: save_file({"a": numbers}, path),
        ):
            with pytest.raises(Exception) as raised:
                write(tmp_path / "file")
            assert no_room(raised.value) == "File too large"
    assert no_room(FileNotFoundError(2, "No such file")) is None
    assert no_room(ValueError("room 28")) is None


def test_what_a_full_cache_cannot_keep_is_found_all_the_same(cache: Path) -> None:
    found = {"numbers": list(range(1000))}
    with no_file_above(100):
        assert kept_finding("probe", "of", lambda: found) == found
    assert kept_finding("probe", "of", lambda: {"numbers": []}) == {"numbers": []}  # nothing half-written was kept
    assert [path.name.partition("-")[0] for path in (cache / "findings").glob("[!.]*")] == ["probe"]


def test_a_full_cache_is_one_line_that_says_how_to_choose_another(cache: Path) -> None:
    def fill(folder: Path) -> None:
        save_file({"a": torch.zeros(1000)}, folder / "big")

    with no_file_above(100), pytest.raises(CacheUnwritable, match="KC_CACHE_DIR=DIR") as raised:
        cached_folder("probe/a", fill)
    assert str(cache) in str(raised.value) and "File too large" in str(raised.value)
    assert not list(cache.rglob("big"))
