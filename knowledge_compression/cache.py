"""The user's cache of results that are computed once: converted models, trained worlds, tokenized tasks, file digests.

Its content is verified. A folder is used only if it was made under its own name and every byte of its files is as it
was written; otherwise it is made again.

A file is read once for its digest, which is reused as long as the file has the same path, size, inode and times. These
include the time of its last status change, which cannot be set back, so an edit that restores the modification time is
noticed too. Not noticed are a write through a memory map that the system has not recorded yet, and a change within a
moment of the reading on a file server whose clock is behind this machine's. The hash (128-bit XXH3) protects against
accidents, not against someone who constructs two files with one digest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path
from xxhash import xxh3_64_hexdigest, xxh3_128

from knowledge_compression.errors import BadInput
from knowledge_compression.writing import no_room

log = logging.getLogger(__name__)

MADE = ".made.json"  # in a folder of the cache: the name under which it was made, and the digest of each of its files
_PART = 2 << 20  # bytes read at a time, which fit in the processor's cache
_SETTLED = 2.0  # seconds, within which a second write may leave a file's times unchanged
_LEFT_FREE = 0.1  # of the disk, left free for everything else
_LONG = 10 << 30  # bytes above which reading is announced


class CacheUnwritable(BadInput):
    """The cache folder cannot be written; the message says why and how to choose another."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the cache folder {cache_folder()} cannot be written ({why}); KC_CACHE_DIR=DIR chooses another place"
        )


def cache_folder() -> Path:
    """``$KC_CACHE_DIR``, or the platform's cache folder for this project."""
    override = os.environ.get("KC_CACHE_DIR")
    return Path(override) if override else user_cache_path("knowledge_compression")


def check_cache() -> None:
    """Refuse a cache folder that cannot be written, before anything needs it.

    Raises:
        CacheUnwritable: it cannot be written.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CacheUnwritable(error.strerror or str(error)) from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file next to ``path``, so one process creates it while the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def kept_finding(name: str, of: Any, find: Callable[[], Any]) -> Any:
    """The result of ``find`` for ``of``, as plain data; computed once, then kept in the cache if it has room."""
    key = hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:16]
    told = lru_cache(lambda: json.dumps({"found": find(), "of": of}, default=str))

    def make(folder: Path) -> None:
        (folder / "finding.json").write_text(told())

    try:
        kept = (cached_folder(f"findings/{name}-{key}", make) / "finding.json").read_text()
    except CacheUnwritable:
        kept = told()
    return json.loads(kept)["found"]


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder ``name``; if it does not exist, ``make`` fills a temporary one that is then renamed.

    A damaged folder is made again. Safe against other processes doing the same, and against interruption.

    Raises:
        CacheUnwritable: the disk has no room.
    """
    folder = cache_folder() / name
    if _is_as_made(folder, name):
        return folder
    with _writing(), locked(folder):
        if not _is_as_made(folder, name):
            if folder.is_dir():
                log.warning("%s in the cache is damaged; making it again", name)
                discard(folder)
            for left in folder.parent.glob(f".{folder.name}-*"):  # left by an interrupted process
                shutil.rmtree(left, ignore_errors=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                make(scratch)
                (scratch / MADE).write_text(json.dumps({"name": name, "files": _digests(scratch)}))
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each library has errors of its own
        if (why := no_room(error)) is None:
            raise
        raise CacheUnwritable(why) from None


def _is_as_made(folder: Path, name: str) -> bool:
    """Whether a folder of the cache was made under that name and is undamaged."""
    try:
        return bool(json.loads((folder / MADE).read_bytes()) == {"name": name, "files": _digests(folder)})
    except (OSError, ValueError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MADE)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def discard(folder: Path) -> None:
    """Remove a folder atomically, so that no process finds half of it."""
    rubbish = folder.with_name(f".{folder.name}-gone-{os.getpid()}")
    try:
        folder.rename(rubbish)
    except FileNotFoundError:
        return
    shutil.rmtree(rubbish, ignore_errors=True)


def keep_within(newest: Path, gigabytes: float) -> None:
    """Delete the least recently used folders next to the newest, which was just used, until few enough remain.

    Args:
        newest: a folder of the cache, which stays.
        gigabytes: upper bound for all of them together; less if a tenth of the disk would not stay free.
    """
    os.utime(newest)
    kept = [path for path in newest.parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    sizes = {folder: _size(folder) for folder in sorted(kept, key=_last_used, reverse=True)}
    disk = shutil.disk_usage(newest)
    room = min(gigabytes * 1e9, sum(sizes.values()) + disk.free - _LEFT_FREE * disk.total)
    for folder, size in sizes.items():
        room -= size
        if room < 0 and folder != newest:
            discard(folder)


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except FileNotFoundError:  # another process has just deleted it
        return 0


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def file_digest(path: Path) -> str:
    """Hash of every byte of a file, in 32 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    path = path.absolute()
    record = cache_folder() / "digests" / f"{xxh3_64_hexdigest(os.fsencode(path))}.json"
    now, known = _identity(path), _known(record)
    if known.get("file") == now:
        return str(known["digest"])
    while True:
        digest = _read(path)
        before, now = now, _identity(path)
        if before == now:
            break
        log.warning("%s changed while it was read; reading it again", path)
    if time.time() - now["changed"] / 1e9 > _SETTLED:
        _keep(record, {"file": now, "digest": digest})
    return digest


def _identity(path: Path) -> dict[str, Any]:
    """What changes when a file is modified; the same on every host that shares it."""
    found = path.stat()
    times = {"modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
    return {"path": str(path), "size": found.st_size, "inode": found.st_ino} | times


def _read(path: Path) -> str:
    digest, part = xxh3_128(), memoryview(bytearray(_PART))
    with path.open("rb", buffering=0) as file:
        if (size := os.fstat(file.fileno()).st_size) > _LONG:
            log.info("reading all %.0f GB of %s once for its digest", size / 1e9, path)
        while count := file.readinto(part):
            digest.update(part[:count])
    return digest.hexdigest()


def _known(record: Path) -> dict[str, Any]:
    """The cached facts of a file; none if it was never read or the cache entry is broken."""
    try:
        known = json.loads(record.read_bytes())
        return known if len(known["digest"]) == 32 else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _keep(record: Path, known: Mapping[str, Any]) -> None:
    """Store the facts of a file, completely or not at all."""
    scratch = record.with_name(f".{record.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(known))
        scratch.rename(record)
    except OSError as error:  # it will be read again next time
        with suppress(OSError):
            scratch.unlink()
        log.info("the digest of %s cannot be stored (%s)", known["file"]["path"], error.strerror)
