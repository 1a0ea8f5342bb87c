"""The user's cache of things that are made once: converted models, trained worlds, tokenized tasks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from knowledge_compression.errors import BadInput


def cache_folder() -> Path:
    """``$KC_CACHE_DIR``, or the platform's cache folder for this project."""
    override = os.environ.get("KC_CACHE_DIR")
    return Path(override) if override else user_cache_path("knowledge_compression")


def check_cache() -> None:
    """Refuse a cache folder that cannot be written, before anything is begun that needs it.

    Raises:
        BadInput: what is wrong, and how to choose another.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(
            f"the cache folder {folder} cannot be written ({error.strerror}); KC_CACHE_DIR=DIR chooses another place"
        ) from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file beside ``path``, so that one process makes it while the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def kept_finding(name: str, of: Any, find: Callable[[], Any]) -> Any:
    """What ``find`` finds out about ``of``, as plain data; found once, then kept in the cache."""
    key = hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def make(folder: Path) -> None:
        (folder / "finding.json").write_text(json.dumps({"found": find(), "of": of}, default=str))

    return json.loads((cached_folder(f"findings/{name}-{key}", make) / "finding.json").read_text())["found"]


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder ``name``; where it is not there, ``make`` fills a temporary one that is then renamed.

    Safe against other processes doing the same, and against dying half-way.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not folder.is_dir():
            for left in folder.parent.glob(f".{folder.name}-*"):  # of one who died half-way
                shutil.rmtree(left, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                make(scratch)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder
