"""The identity of a model on disk, which reads every byte once, compared with reading alone and with SHA-256.

    python benchmarks/fingerprint.py --gigabytes 4

A model folder in shards of a gigabyte is written, and is then in the page cache; everything runs on one core. ``again``
is the time of every later run, which uses the stored digests. Sizes are in 10^9 bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from side_by_side import in_turn, spread, write

from knowledge_compression import cache
from knowledge_compression.models.content import folder_fingerprint

SHARD = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["KC_CACHE_DIR"] = f"{scratch}/cache"
        cache._SETTLED = -1.0  # as if the files had lain there for long, so that their digests are kept
        folder = Path(scratch) / "model"
        folder.mkdir()
        noise = os.urandom(SHARD)
        for i in range(options.gigabytes):
            (folder / f"model-{i:05}.safetensors").write_bytes(noise)
        del noise
        print(result := measured(folder, options.repeats))
    write("fingerprint", {"gigabytes": options.gigabytes, **result})


def measured(folder: Path, repeats: int) -> dict[str, object]:
    def first() -> None:
        shutil.rmtree(cache.cache_folder() / "digests", ignore_errors=True)
        folder_fingerprint(folder)

    def reading() -> None:
        part = memoryview(bytearray(2 << 20))
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.readinto(part):
                    pass

    def sha256() -> None:
        for path in folder.iterdir():
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")

    contestants = {"reading alone": reading, "first time": first, "again": lambda: folder_fingerprint(folder)}
    first()
    seconds = in_turn(contestants | {"sha256": sha256}, repeats)
    size = sum(path.stat().st_size for path in folder.iterdir())
    speeds = {
        f"{name}, GB/s": spread([size / 1e9 / taken for taken in seconds[name]])
        for name in ("reading alone", "first time", "sha256")
    }
    return speeds | {"again, seconds": spread(seconds["again"])}


if __name__ == "__main__":
    main()
