"""What lies at a path: a compressed checkpoint in a format that is read here, or something else."""

from __future__ import annotations

from pathlib import Path

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.folder import QuantizedFolder
from knowledge_compression.models.checkpoints.gguf import GgufFile
from knowledge_compression.models.checkpoints.stored import Stored


def stored_at(place: Path) -> Stored | None:
    """The compressed checkpoint at a path; None where it is none, or one that transformers itself must load.

    Raises:
        BadInput: it is compressed in a way that is not read.
        ModelUnavailable: a part of it is not there.
    """
    if place.is_file():
        return GgufFile.at(place)
    if (place / "config.json").is_file():
        return QuantizedFolder.at(place)
    return gguf_in(place)


def gguf_in(folder: Path) -> GgufFile | None:
    """The one GGUF file of a folder that has no configuration, split or not.

    Raises:
        BadInput: there are several.
    """
    found = {file.files: file for path in sorted(folder.glob("*.gguf")) if (file := GgufFile.at(path))}
    if len(found) > 1:
        names = ", ".join(file.files[0].name for file in found.values())
        raise BadInput(f"{folder} holds several GGUF files ({names}); name one, e.g. model.path={folder}/FILE")
    return next(iter(found.values()), None)
