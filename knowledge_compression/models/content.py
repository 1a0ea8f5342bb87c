"""The content of a model folder: the files that decide the model's answers, and the digest of all their bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from xxhash import xxh3_128

from knowledge_compression.cache import file_digest
from knowledge_compression.errors import ModelUnavailable

INDEX_ENDING = ".index.json"  # ending of a file that maps weights to the files that hold them

# Files in model folders that ``from_pretrained`` never reads: notes and pictures, weights for other programs, and
# training states.
_NOT_READ = {
    *(".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".webp"),
    *(".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".pt", ".pth", ".log", ".lock"),
}


def folder_fingerprint(folder: Path) -> str:
    """Digest of a model folder, independent of its path: names and bytes of all files that may affect the model's
    answers.

    Those are the files directly in the folder and those named by an index of weights, except hidden files and files
    that no loader reads; a file of an unknown kind is included.

    Raises:
        ModelUnavailable: one cannot be read.
    """
    try:
        here = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    except OSError as error:
        raise ModelUnavailable(f"{folder} cannot be read ({error.strerror})") from None
    read = {path for path in here if path.suffix.lower() not in _NOT_READ}
    shards = {folder / name for path in read if path.name.endswith(INDEX_ENDING) for name in _shards(path)}
    return files_fingerprint(read | {path for path in shards if path.is_file()}, folder)


def check_shards(folder: Path) -> None:
    """Refuse a folder whose index of weights names files outside the folder or missing safetensors files.

    Raises:
        ModelUnavailable: there is such an entry; the message names the file.
    """
    for index in sorted(folder.glob(f"*{INDEX_ENDING}")):
        read = index.name == "model.safetensors.index.json" and not (folder / "model.safetensors").is_file()
        for name in sorted(set(_shards(index))):
            if Path(name).name != name:
                raise ModelUnavailable(f"{index} refers to a file outside its folder: {name}")
            if read and not (folder / name).is_file():
                raise ModelUnavailable(f"{folder} lacks {name}, one of its weight files; copy it there")


def files_fingerprint(files: Iterable[Path], folder: Path | None = None) -> str:
    """Digest of the files' bytes and of their names, relative to ``folder`` or the last component alone.

    Raises:
        ModelUnavailable: one cannot be read.
    """
    whole = xxh3_128()
    for path in sorted(files):
        name = path.name if folder is None else os.path.relpath(path, folder)
        try:
            whole.update(json.dumps([name, file_digest(path)]).encode())
        except OSError as error:
            raise ModelUnavailable(f"{path} cannot be read ({error.strerror})") from None
    return whole.hexdigest()


def _shards(index: Path) -> list[str]:
    """The files that an index names; if the index cannot be read, the loader of the weights reports why."""
    try:
        return [str(name) for name in json.loads(index.read_bytes())["weight_map"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
