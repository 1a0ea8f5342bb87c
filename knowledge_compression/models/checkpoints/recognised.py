"""Recognising whether a path holds a compressed checkpoint in a format that can be read."""

from __future__ import annotations

from pathlib import Path

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.folder import QuantizedFolder
from knowledge_compression.models.checkpoints.gguf.file import GgufFile
from knowledge_compression.models.checkpoints.stored import Stored

CONFIGURATION = "config.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def stored_at(place: Path) -> Stored | None:
    """The compressed checkpoint at a path; None if there is none, or if transformers itself must load it.

    A folder's ``config.json`` as the path chooses what it describes, whatever GGUF files lie beside it.

    Raises:
        BadInput: it is compressed in a way that cannot be read, or a folder holds two models.
        ModelUnavailable: a part of it is missing.
    """
    if place.name == CONFIGURATION:
        return QuantizedFolder.at(place.parent)
    if place.is_file():
        return GgufFile.at(place)
    if not (place / CONFIGURATION).is_file():
        return gguf_in(place)
    files = [path for path in sorted(place.glob("*.gguf")) if GgufFile.at(path)]
    weights = [path for pattern in _WEIGHTS for path in sorted(place.glob(pattern))]
    if files and weights:
        raise BadInput(
            f"it holds both {weights[0].name} and {files[0].name}; choose one by model.path={place / CONFIGURATION} or "
            f"model.path={files[0]}"
        )
    return gguf_in(place) if files else QuantizedFolder.at(place)


def gguf_in(folder: Path) -> GgufFile | None:
    """The only GGUF file, split or not, of a folder without a configuration.

    Raises:
        BadInput: there are several.
    """
    found = {file.files: file for path in sorted(folder.glob("*.gguf")) if (file := GgufFile.at(path))}
    if len(found) > 1:
        names = ", ".join(file.files[0].name for file in found.values())
        raise BadInput(f"{folder} holds several GGUF files ({names}); choose one, e.g. model.path={folder}/FILE")
    return next(iter(found.values()), None)
