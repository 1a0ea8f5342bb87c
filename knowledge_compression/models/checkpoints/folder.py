"""A folder of quantized safetensors, in one of the formats that ``quantization_config`` names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints.awq import Awq
from knowledge_compression.models.checkpoints.base import Coded, Format, StoredAs
from knowledge_compression.models.checkpoints.bitsandbytes import EightBit, FourBit
from knowledge_compression.models.checkpoints.compressed_tensors import CompressedTensors
from knowledge_compression.models.checkpoints.fp8 import BlockFp8
from knowledge_compression.models.checkpoints.gptq import Gptq
from knowledge_compression.models.checkpoints.mxfp4 import Mxfp4
from knowledge_compression.models.checkpoints.stored import Later, Stored
from knowledge_compression.models.checkpoints.torchao import TorchAo
from knowledge_compression.models.streamed import Checkpoint, Described, names_in_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FORMATS: tuple[type[Format], ...] = (Gptq, Awq, CompressedTensors, FourBit, EightBit, BlockFp8, Mxfp4, TorchAo)
# The files in which older programs wrote the settings.
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_SETTINGS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Layer:
    """One layer's tensors.

    Attributes:
        path: path of the layer.
        names: names of its tensors, by their endings.
        coded: the weight that they represent.
        bytes: bytes of all of them.
    """

    path: str
    names: Mapping[str, str]
    coded: Coded
    bytes: int


@dataclass(frozen=True)
class QuantizedFolder(Stored):
    """A folder of quantized safetensors.

    Attributes:
        folder: its path.
        format: the format of its layers.
    """

    folder: Path
    format: Format

    @classmethod
    def at(cls, folder: Path) -> QuantizedFolder | None:
        """The content of a folder, if it declares a format that can be read.

        Raises:
            BadInput: it is in a variant that cannot be read, or in a format that transformers does not know either.
        """
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

        settings = settings_of(folder)
        if (found := _format(settings)) is not None:
            return cls(folder, found.of(settings))
        if settings and settings.get("quant_method") not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            raise BadInput(
                f"its quantization_config names quant_method={settings.get('quant_method')!r}, which neither this "
                f"program nor transformers knows; {', '.join(readable())} and GGUF files can be read"
            )
        return None

    def configuration(self, **hub: Any) -> PretrainedConfig:
        """The configuration of the folder, without its quantization."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder, **hub)
        for name in _SETTINGS:
            if hasattr(config, name):
                delattr(config, name)
        return config

    def tokenizer(self, **hub: Any) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, **hub)

    def weights(self, skeleton: PreTrainedModel) -> dict[str, Later]:
        """The layers, decoded, and every other tensor as it is."""
        layers = {f"{layer.path}{self.format.weight}": layer for layer in self.layers}
        parts = {name for layer in self.layers for name in layer.names.values()}
        plain = {name: described for name, described in self.described.items() if name not in parts}
        wanted = skeleton.state_dict()
        turned = set()
        for name, key in names_in_files(skeleton, [*layers, *plain]).items():
            if name not in wanted:
                continue
            shape = tuple(wanted[name].shape)
            if key in layers:
                path = name.rpartition(".")[0]
                if isinstance(skeleton.get_submodule(path), Conv1D):
                    turned.add(key)
                    shape = shape[::-1]
                if layers[key].coded.shape != shape:
                    raise BadInput(
                        f"{layers[key].path} represents weights of shape {list(layers[key].coded.shape)}, but the "
                        f"configuration describes {list(shape)}"
                    )
            elif wanted[name].is_floating_point() and not plain[key].floats:
                raise BadInput(f"it holds {key} as integers, and nothing describes what they represent")
        decoded = {key: Later(partial(self._decode, layer, key in turned)) for key, layer in layers.items()}
        return decoded | {name: Later(partial(self._checkpoint.read, name)) for name in plain}

    def record(self) -> StoredAs:
        """From the headers of the files."""
        parts = {name for layer in self.layers for name in layer.names.values()}
        rest: Counter[str] = Counter()
        for name, described in self.described.items():
            if name not in parts and described.floats:
                rest[described.dtype] += described.count
        return StoredAs.of(
            self.format.name,
            [(layer.coded, layer.bytes) for layer in self.layers],
            rest,
            tensors=sum(described.bytes for described in self.described.values()),
            files=self._checkpoint.bytes,
            made_by=self.format.made_by,
            notes=self.format.notes,
        )

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)

    @cached_property
    def described(self) -> dict[str, Described]:
        """Every tensor of the files."""
        return self._checkpoint.described()

    @cached_property
    def layers(self) -> list[Layer]:
        """Every layer that is stored in the format.

        Raises:
            BadInput: there is none, or the tensors of one contradict one another.
        """
        form, there = self.format, self.described
        paths = [name.removesuffix(form.mark) for name in there if name.endswith(form.mark)]
        if not paths:
            raise BadInput(
                f"its configuration declares the format {form.name}, but no tensor in it ends in {form.mark}"
            )
        names = {path: {end: path + end for end in form.endings if path + end in there} for path in paths}
        telling = [name for of in names.values() for end, name in of.items() if end in form.telling]
        told = self._checkpoint.read_all(telling)
        return [self._layer(path, of, told) for path, of in names.items()]

    def _layer(self, path: str, names: Mapping[str, str], told: Mapping[str, Tensor]) -> Layer:
        there = {end: self.described[name] for end, name in names.items()}
        facts = {end: told[name] for end, name in names.items() if name in told}
        size = sum(described.bytes for described in there.values())
        return Layer(path, names, self.format.coded(path, there, facts), size)

    def _decode(self, layer: Layer, turned: bool) -> Tensor:
        tensors = self._checkpoint.read_all(layer.names.values())
        weight = self.format.decode(layer.path, {end: tensors[name] for end, name in layer.names.items()})
        return weight.T if turned else weight


def settings_of(folder: Path) -> Mapping[str, Any]:
    """A model folder's declaration of its quantization; empty if there is none.

    Raises:
        BadInput: it is not a mapping of settings.
    """
    config = _read(folder / "config.json")
    for name in _SETTINGS:
        if isinstance(settings := config.get(name), Mapping):
            return settings
        if settings is not None:
            raise BadInput(f"its config.json has {name}={settings!r}, which must be a mapping with a quant_method")
    for name, method in _BESIDE.items():
        if settings := _read(folder / name):
            return {"quant_method": method} | dict(settings)
    return {}


def readable() -> list[str]:
    """The values of ``quant_method`` that are read here."""
    return list(dict.fromkeys(name.split("_")[0] for form in FORMATS for name in form.methods))


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Whether a configuration names a format that is decoded here."""
    settings = (config.get(name) for name in _SETTINGS)
    return any(isinstance(one, Mapping) and _format(one) is not None for one in settings)


def _format(settings: Mapping[str, Any]) -> type[Format] | None:
    method = str(settings.get("quant_method"))
    if method == "bitsandbytes":
        method += "_8bit" if settings.get("load_in_8bit") else "_4bit"
    return next((one for one in FORMATS if method in one.methods), None)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # the code that needs the file reports the error
    return content if isinstance(content, Mapping) else {}
