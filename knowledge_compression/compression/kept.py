"""Compressed models kept in the cache folder, so that runs which differ in nothing but what follows compress once.

Kept is what a compression changed: tensors whose bytes are others than before, the integers behind weights that were
rounded to a grid, and the modules that took a linear layer's place. All of it is copied into a model as it was loaded,
which is then the compressed one, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from xxhash import xxh3_128_digest

from knowledge_compression.cache import cache_folder, cached_folder, discard
from knowledge_compression.compression.formats.int8_linear import Int8Linear
from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.compression.methods.int8_static import StaticInt8Linear
from knowledge_compression.compression.methods.smoothquant import SmoothedInt8Linear
from knowledge_compression.compression.solve.grid import FittedGrid, QuantizedWeight, quantized_weight
from knowledge_compression.models import Model, Targets
from knowledge_compression.models.targets import TargetLayer, linear_layers

log = logging.getLogger(__name__)

_LEFT_FREE = 0.1  # of the disk, for what is not a cache
FORMAT = 2  # raised when an old file would be read as another model
_FILE = "changes.safetensors"
_GRID = ("scales", "zeros", "group_of")
_SETTINGS = ("bits", "symmetric", "scale_bits")
_MODULES = {kind.__name__: kind for kind in (Int8Linear, StaticInt8Linear, SmoothedInt8Linear)}


class _NotKept(Exception):
    """It was compressed, and cannot be kept."""


@dataclass(frozen=True)
class KeptModels:
    """The compressed models in the cache folder.

    Attributes:
        gigabytes: most that all of them may take together; those that were not used for longest go first. They also
            go while less than a tenth of the disk is free.
    """

    gigabytes: float

    def takes(self, size: float) -> bool:
        """Whether a model whose compressed weights have so many bytes is kept at all."""
        return size <= self.gigabytes * 1e9

    def compress(
        self, key: str, model: Model, targets: Targets, compress: Callable[[], CompressionReport], *, afresh: bool
    ) -> tuple[CompressionReport, bool]:
        """Compress a model as it was loaded, or make it what the same compression made of it before.

        Processes that want the same at once wait for the one that does it.

        Args:
            key: what decides the outcome, as a name for a folder.
            model: as it was loaded.
            targets: what is going to be compressed of it.
            compress: does it, in place.
            afresh: do it again although it is kept.

        Returns:
            The report of whoever did it, and whether it was done before.
        """
        if not self.takes(sum(layer.weight.nbytes for layer in targets)):
            return compress(), False
        name = f"compressions/{key}"
        if afresh:
            discard(cache_folder() / name)
        made: list[CompressionReport] = []

        def make(folder: Path) -> None:
            before = _State.of(model)
            made.append(compress())
            try:
                _write(folder, model, before, made[0])
            except (OSError, SafetensorError, NotImplementedError) as error:
                raise _NotKept(f"{type(error).__name__}: {error}") from error

        while True:
            try:
                folder = cached_folder(name, make)
            except _NotKept as error:
                log.warning("other runs will compress this model again: it cannot be kept (%s)", error)
                return made[0], False
            if made:
                self._make_room(folder)
                return made[0], False
            try:
                report = _restore(folder, model)
            except (OSError, SafetensorError) as error:  # it has just been removed, or is broken
                log.warning("%s cannot be read (%s); compressing again", folder, error)
                discard(folder)
                continue
            os.utime(folder)
            log.info("this model was compressed before (%s)", folder)
            return report, True

    def _make_room(self, newest: Path) -> None:
        """Discard what was not used for longest until the rest keeps to the bound and leaves room on the disk."""
        kept = [path for path in newest.parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
        sizes = {folder: _size(folder) for folder in sorted(kept, key=_last_used, reverse=True)}
        disk = shutil.disk_usage(newest)
        room = min(self.gigabytes * 1e9, sum(sizes.values()) + disk.free - _LEFT_FREE * disk.total)
        for folder, size in sizes.items():
            room -= size
            if room < 0 and folder != newest:
                discard(folder)


def code_of(compression: object) -> str:
    """Digest of the code that a compression is made of: a method that was edited does not find what it made before."""
    sha = hashlib.sha256(_our_code())
    kinds = {type(part) for part in (compression, *getattr(compression, "steps", ()))}
    files = {getattr(sys.modules.get(kind.__module__), "__file__", None) for kind in kinds}
    for file in sorted(filter(None, files)):
        sha.update(Path(file).read_bytes())
    return sha.hexdigest()[:16]


@cache
def _our_code() -> bytes:
    package = Path(__file__).parents[1]
    files = sorted(path for folder in ("compression", "models") for path in (package / folder).rglob("*.py"))
    return b"".join(path.read_bytes() for path in files)


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except FileNotFoundError:  # another process has just discarded it
        return 0


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _tensors(model: Model) -> dict[str, Tensor]:
    return dict(chain(model.network.named_parameters(), model.network.named_buffers()))


@dataclass(frozen=True)
class _State:
    """What a model is before it is compressed: enough to tell what became other.

    Attributes:
        digests: of each tensor's bytes.
        modules: the kind of each module, and whether anything was hung on it.
        tied: whether the head was that of the embeddings.
    """

    digests: Mapping[str, bytes]
    modules: Mapping[str, Any]
    tied: bool

    @classmethod
    def of(cls, model: Model) -> _State:
        modules = {path: _kind(module) for path, module in model.network.named_modules()}
        return cls({name: _digest(tensor) for name, tensor in _tensors(model).items()}, modules, model.head_is_tied)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return type(module), hooks, module.__dict__.get("forward")


def _digest(tensor: Tensor) -> bytes:
    raw: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return xxh3_128_digest(raw)


def _write(folder: Path, model: Model, before: _State, report: CompressionReport) -> None:
    """Write what is other than before.

    Raises:
        NotImplementedError: a module became other in a way that its tensors do not tell.
    """
    modules = {path: m for path, m in model.network.named_modules() if before.modules.get(path) != _kind(m)}
    for path, module in modules.items():
        if _kind(module) != (_MODULES.get(type(module).__name__), (), None):
            raise NotImplementedError(f"the {type(module).__name__} at {path} is more than its tensors")
    layers = linear_layers(model)
    codes = {layer.path: found for layer in layers if (found := quantized_weight(layer)) is not None}
    tensors = {
        f"tensor/{name}": tensor.detach().cpu().contiguous()
        for name, tensor in _tensors(model).items()
        if before.digests.get(name) != _digest(tensor) and name.removesuffix(".weight") not in codes
    }
    for path, weight in codes.items():
        tensors[f"codes/{path}/codes"] = weight.codes
        tensors |= {f"codes/{path}/{name}": getattr(weight.grid, name) for name in _GRID}
        tensors[f"codes/{path}/group_of"] = weight.grid.group_of.clone()  # neighbours have one between them
    about = {
        "format": FORMAT,
        "untied": before.tied and not model.head_is_tied,
        "codes": {path: {name: getattr(weight.grid, name) for name in _SETTINGS} for path, weight in codes.items()},
        "modules": {path: [type(module).__name__, module.settings] for path, module in modules.items()},
        "report": report.to_json(),
    }
    save_file(tensors, folder / _FILE, {"about": json.dumps(about)})


def _restore(folder: Path, model: Model) -> CompressionReport:
    """Make a model as it was loaded what the compression made of it.

    Raises:
        OSError, SafetensorError: the file is not there, or not whole; the model is as it was.
    """
    with safe_open(folder / _FILE, "pt") as file:
        about: dict[str, Any] = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if about["format"] != FORMAT:
        raise OSError(f"it is of format {about['format']}, not {FORMAT}")
    if about["untied"]:
        model.untie_head()
    layers: dict[str, TargetLayer] = {layer.path: layer for layer in linear_layers(model)}
    for path, (kind, settings) in about["modules"].items():
        prefix = f"tensor/{path}."
        names = [name for name in tensors if name.startswith(prefix) and name != f"{prefix}bias"]
        buffers = {name.removeprefix(prefix): tensors.pop(name).to(model.device) for name in names}
        layers[path].replace(_MODULES[kind].from_buffers(buffers, layers[path].module.bias, **settings))
    for path, settings in about["codes"].items():
        grid = FittedGrid(**{name: tensors.pop(f"codes/{path}/{name}") for name in _GRID}, **settings)
        with torch.no_grad():
            QuantizedWeight(tensors.pop(f"codes/{path}/codes"), grid).put_into(layers[path])
    now = _tensors(model)
    for name, tensor in tensors.items():
        now[name.removeprefix("tensor/")].data.copy_(tensor)
    return CompressionReport.from_json(about["report"])
