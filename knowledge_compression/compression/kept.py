"""A cache of compressed models: runs that differ only in recovery or evaluation compress once.

The cache holds everything that a compression may change. For the layers that its report names, that is their weights,
the integer codes or GGUF blocks of quantized weights, the modules that replaced them, and the norms and biases that
were scaled by factors of their inputs. For a network that was made smaller, it is also the biases and the
configuration. All of it is copied into a freshly loaded model, which is then bit for bit the compressed one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from knowledge_compression.cache import CacheUnwritable, cache_folder, cached_folder, discard, keep_within
from knowledge_compression.compression.base import Compression, memory_bytes
from knowledge_compression.compression.layer_reports import CompressionReport
from knowledge_compression.compression.solve.coding import FP8, INTEGERS, MXFP4, NF4, NVFP4, CodedWeight
from knowledge_compression.compression.solve.floats import FloatWeight
from knowledge_compression.compression.solve.grid import QuantizedWeight, quantized_weight
from knowledge_compression.compression.solve.nf4 import Nf4Weight
from knowledge_compression.heavy import torch
from knowledge_compression.models import Model, Targets
from knowledge_compression.models.reshaped import changed_settings, put_in_place, restored
from knowledge_compression.models.targets import linear_layers

if TYPE_CHECKING:
    from torch import Tensor

    from knowledge_compression.models.replaced import ReplacedLinear

log = logging.getLogger(__name__)

FORMAT = 6  # raised whenever an old file would be misread
_FORMS: Mapping[str, type[CodedWeight]] = {
    **{INTEGERS: QuantizedWeight, NF4: Nf4Weight},
    **{FP8: FloatWeight, MXFP4: FloatWeight, NVFP4: FloatWeight},
}
_FILE = "changes.safetensors"


class _NotKept(Exception):
    """The model was compressed but cannot be stored."""


@dataclass(frozen=True)
class KeptModels:
    """The compressed models in the cache folder.

    Attributes:
        gigabytes: upper bound for all of them together; the least recently used are deleted first, also while less than
            a tenth of the disk is free.
    """

    gigabytes: float

    def takes(self, size: float) -> bool:
        """Whether a model whose compressed weights take this many bytes is kept at all."""
        return size <= self.gigabytes * 1e9

    def compress(
        self,
        key: str,
        model: Model,
        targets: Targets,
        method: Compression,
        compress: Callable[[], CompressionReport],
        *,
        afresh: bool,
    ) -> tuple[CompressionReport, bool]:
        """Compress a freshly loaded model, or restore the result of the same compression from the cache.

        Processes that need the same compression at the same time wait for the one that does it.

        Args:
            key: identifies everything that decides the outcome; used as a folder name.
            model: the freshly loaded model.
            targets: the layers to be compressed.
            method: the compression, which declares the modules it inserts.
            compress: compresses in place.
            afresh: compress again even if the result is cached.

        Returns:
            The report of the compression, and whether it came from the cache.
        """
        beyond = any(part.beyond_targets for part in method.parts)
        size = memory_bytes(model.network) if method.reshapes else sum(layer.weight.nbytes for layer in targets)
        if beyond or not self.takes(size):
            return compress(), False
        name = f"compressions/{key}"
        kinds = [kind for part in method.parts for kind in part.modules]
        if afresh:
            discard(cache_folder() / name)
        made: list[CompressionReport] = []

        def make(folder: Path) -> None:
            tied, before = model.head_is_tied, model.network.config
            made.append(compress())
            try:
                _write(folder, model, made[0], kinds, before, untied=tied and not model.head_is_tied)
            except (OSError, SafetensorError, NotImplementedError) as error:
                raise _NotKept(f"{type(error).__name__}: {error}") from error

        while True:
            try:
                folder = cached_folder(name, make)
            except (_NotKept, CacheUnwritable) as error:
                if not made:
                    raise
                log.warning("the compressed model cannot be cached (%s); other runs will compress it again", error)
                return made[0], False
            if made:
                keep_within(folder, self.gigabytes)
                return made[0], False
            try:
                report = _restore(folder, model, kinds)
            except (OSError, SafetensorError) as error:  # just deleted by another process, or damaged
                log.warning("%s cannot be read (%s); compressing again", folder, error)
                discard(folder)
                continue
            os.utime(folder)
            log.info("the compressed model was read from the cache (%s)", folder)
            return report, True


def code_of(compression: Compression) -> str:
    """Digest of the compression code, so that an edited method does not find results of the old code."""
    sha = hashlib.sha256(_our_code())
    kinds = {type(part) for part in (compression, *compression.parts)}
    files = {getattr(sys.modules.get(kind.__module__), "__file__", None) for kind in kinds}
    for file in sorted(filter(None, files)):
        sha.update(Path(file).read_bytes())
    return sha.hexdigest()[:16]


@cache
def _our_code() -> bytes:
    package = Path(__file__).parents[1]
    files = sorted(path for folder in ("compression", "models") for path in (package / folder).rglob("*.py"))
    return b"".join(path.read_bytes() for path in files)


def _write(
    folder: Path,
    model: Model,
    report: CompressionReport,
    kinds: Sequence[type[ReplacedLinear]],
    before: Any,
    *,
    untied: bool,
) -> None:
    """Write the compressed state of the layers that the report names.

    Raises:
        NotImplementedError: a layer was replaced by a module that the compression does not declare.
    """
    from safetensors.torch import save_file

    from knowledge_compression.compression.formats.gguf_blocks import kept_blocks

    touched = {layer.path if report.smaller is None else report.smaller.path_now(layer.path) for layer in report.layers}
    tensors: dict[str, Tensor] = {}
    codes: dict[str, dict[str, Any]] = {}
    kinds_of_blocks: dict[str, str] = {}
    modules: dict[str, tuple[str, dict[str, Any]]] = {}
    weights = {layer.weight_name for layer in linear_layers(model) if layer.path in touched}
    for name in {name for layer in report.layers for name in layer.factors_in} - weights:
        tensors[f"parameter/{name}"] = model.network.get_parameter(name)
    for layer in linear_layers(model):
        if layer.path not in touched:
            continue
        if type(layer.module) in kinds:
            modules[layer.path] = type(layer.module).__name__, layer.module.settings  # type: ignore[assignment]
            tensors |= {f"module/{layer.path}/{name}": buffer for name, buffer in layer.module.named_buffers()}
        elif layer.is_replaced:
            raise NotImplementedError(f"the {type(layer.module).__name__} at {layer.path} is not declared")
        elif layer.module._forward_hooks or layer.module._forward_pre_hooks:
            raise NotImplementedError(f"{layer.path} has hooks, which cannot be stored")
        elif (weight := quantized_weight(layer)) is not None:
            parts, codes[layer.path] = weight.taken_apart()
            codes[layer.path]["kind"] = weight.coding.kind
            tensors |= {f"codes/{layer.path}/{name}": tensor for name, tensor in parts.items()}
        elif (blocks := kept_blocks(layer)) is not None:
            kinds_of_blocks[layer.path] = blocks.kind.name
            tensors[f"blocks/{layer.path}"] = torch.from_numpy(blocks.data)
        else:
            tensors[f"weight/{layer.path}"] = layer.weight
    if report.smaller is not None:
        biases = {x.path: x.bias for x in linear_layers(model) if x.path in touched and x.bias is not None}
        tensors |= {f"bias/{path}": bias for path, bias in biases.items()}
    about = {"format": FORMAT, "untied": untied, "codes": codes, "blocks": kinds_of_blocks, "modules": modules}
    about |= {"report": report.to_json(), "settings": changed_settings(before, model.network.config)}
    on_the_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_the_cpu, folder / _FILE, {"about": json.dumps(about)})


def _restore(folder: Path, model: Model, kinds: Sequence[type[ReplacedLinear]]) -> CompressionReport:
    """Restore a model to the stored compressed state.

    Raises:
        OSError, SafetensorError: the file is missing or incomplete.
    """
    from gguf import GGMLQuantizationType as Kind

    from knowledge_compression.compression.formats.gguf_blocks import Blocks

    with safe_open(folder / _FILE, "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if about["format"] != FORMAT:
        raise OSError(f"it is of format {about['format']}, not {FORMAT}")
    if about["untied"]:
        model.untie_head()
    report = CompressionReport.from_json(about["report"])
    if report.smaller is not None:
        paths = model.architecture.block_paths(model.network)
        kept = [path for path in paths if path not in report.smaller.dropped]
        blocks = {report.smaller.moved.get(path, path): path for path in kept} if report.smaller.dropped else {}
        put_in_place(model, restored(model.network, about["settings"], blocks))
    layers = {layer.path: layer for layer in linear_layers(model)}
    kind_of = {kind.__name__: kind for kind in kinds}
    for path, (kind, settings) in about["modules"].items():
        prefix = f"module/{path}/"
        names = [name for name in tensors if name.startswith(prefix)]
        buffers = {name.removeprefix(prefix): tensors[name].to(model.device) for name in names}
        layers[path].replace(kind_of[kind].from_buffers(buffers, layers[path].bias_parameter, **settings))
    with torch.no_grad():
        for path, settings in about["codes"].items():
            prefix = f"codes/{path}/"
            parts = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
            _FORMS[settings["kind"]].put_together(parts, settings).put_into(layers[path])
        for path, kind in about["blocks"].items():
            Blocks(Kind[kind], tensors[f"blocks/{path}"].numpy()).put_into(layers[path])
        for name, tensor in tensors.items():
            if name.startswith("weight/"):
                layers[name.removeprefix("weight/")].weight.copy_(tensor)
            elif name.startswith("parameter/"):
                model.network.get_parameter(name.removeprefix("parameter/")).copy_(tensor)
            elif name.startswith("bias/"):
                layers[name.removeprefix("bias/")].bias.copy_(tensor)  # type: ignore[union-attr]
    return report
