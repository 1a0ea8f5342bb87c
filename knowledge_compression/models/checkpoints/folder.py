"""A folder of quantized safetensors, in one of the formats that ``quantization_config`` names."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from knowledge_compression.errors import BadInput
from knowledge_compression.models.checkpoints import mlx
from knowledge_compression.models.checkpoints.auto_round import AutoRound
from knowledge_compression.models.checkpoints.awq import Awq
from knowledge_compression.models.checkpoints.base import Coded, Format, StoredAs
from knowledge_compression.models.checkpoints.bitsandbytes import EightBit, FourBit
from knowledge_compression.models.checkpoints.compressed_tensors import CompressedTensors
from knowledge_compression.models.checkpoints.fp8 import BlockFp8
from knowledge_compression.models.checkpoints.gptq import Gptq
from knowledge_compression.models.checkpoints.hqq import Hqq
from knowledge_compression.models.checkpoints.mlx import Mlx
from knowledge_compression.models.checkpoints.modelopt import ModelOpt
from knowledge_compression.models.checkpoints.mxfp4 import Mxfp4
from knowledge_compression.models.checkpoints.stored import Later, Stored
from knowledge_compression.models.checkpoints.torchao import TorchAo
from knowledge_compression.models.streamed import Checkpoint, Described, has_weights, names_in_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FORMATS: tuple[type[Format], ...] = (
    *(Gptq, Awq, CompressedTensors, FourBit, EightBit, BlockFp8, Mxfp4, TorchAo, Hqq, Mlx, ModelOpt),
)
_READ: tuple[type[Format] | type[AutoRound], ...] = (*FORMATS, AutoRound)
# The files in which older programs wrote the settings.
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# Files of folders that say nothing of their quantization in config.json, and cannot be read.
_FOREIGN = {"quanto_qmap.json": "written by optimum-quanto", "qmodel.pt": "a pickle written by hqq"}
_SETTINGS = ("quantization_config", "compression_config")
_NUMBER = re.compile(r"\.\d+\.")


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


class Piece(NamedTuple):
    """The part of a tensor, or of a layer's weight, that is one weight in the files of the model's publisher.

    Attributes:
        name: of the tensor or weight in these files.
        shape: of the part.
        expert: which expert of a bank it is; None if it is the whole.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None


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

        if (settings := settings_of(folder)) is None:
            for name, told in _FOREIGN.items():
                if (folder / name).is_file():
                    known = ", ".join(readable())
                    raise BadInput(f"it holds {name}, {told}, which cannot be read; {known} and GGUF files can be read")
            return None
        if (found := _format(settings)) is not None:
            return cls(folder, found.of(settings))
        if (method := settings.get("quant_method")) not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            told = "no quant_method" if method is None else f"quant_method={method!r}"
            known = "" if method is None else ", which neither this program nor transformers knows"
            raise BadInput(
                f"its quantization_config names {told}{known}; {', '.join(readable())} and GGUF files can be read"
            )
        return None

    def configuration(self, **hub: Any) -> PretrainedConfig:
        """The configuration of the folder, without its quantization."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.folder, **hub)
        for name in (*_SETTINGS, "quantization"):
            if hasattr(config, name):
                delattr(config, name)
        return self.format.configuration(config)

    def tokenizer(self, **hub: Any) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, **hub)

    def weights(self, skeleton: PreTrainedModel) -> dict[str, Later]:
        """The layers, decoded, and every other tensor as it is."""
        layers = {f"{layer.path}{self.format.weight}": layer for layer in self.layers}
        parts = {name for layer in self.layers for name in layer.names.values()}
        plain = {name: described.shape for name, described in self.described.items() if name not in parts}
        self._check_one_format(plain)
        coded = self._pieces({name: layer.coded.shape for name, layer in layers.items()})
        floats = self._pieces(plain)
        wanted = skeleton.state_dict()
        turned = set()
        for name, key in names_in_files(skeleton, [*coded, *floats]).items():
            if name not in wanted:
                continue
            if key in coded:
                shape, layer = tuple(wanted[name].shape), layers[coded[key].name]
                if isinstance(skeleton.get_submodule(name.rpartition(".")[0]), Conv1D):
                    turned.add(key)
                    shape = shape[::-1]
                if coded[key].shape != shape:
                    raise BadInput(
                        f"{layer.path} represents weights of shape {list(coded[key].shape)}, but the "
                        f"configuration describes {list(shape)}"
                    )
                continue
            stored = floats[key].name
            if wanted[name].is_floating_point() and not self.described[stored].plain:
                raise BadInput(
                    f"it holds {stored} in the type {self.described[stored].dtype}, without the scales that belong to "
                    f"it; its layers must be {self.format.name} or plain floats"
                )
            if isinstance(skeleton.get_submodule(name.rpartition(".")[0]), nn.Linear):
                self._check_left_out(stored, name)
        decoded = {
            key: Later(partial(self._decode, layers[piece.name], piece.expert, key in turned))
            for key, piece in coded.items()
        }
        return decoded | {key: Later(partial(self._read, piece)) for key, piece in floats.items()}

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
        if not paths and not form.may_be_floats:
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

    def _check_one_format(self, plain: Iterable[str]) -> None:
        """Refuse a layer that is stored in another format than the declared one.

        Raises:
            BadInput: there is such a layer.
        """
        for name, other in coded_elsewhere(plain):
            raise BadInput(
                f"its configuration declares the format {self.format.name}, but it holds {name}, which is part of a "
                f"layer in the format {other}; all layers must be {self.format.name} or plain floats"
            )

    def _check_left_out(self, key: str, name: str) -> None:
        """Refuse a weight stored as floats, if the same layer of another block is coded and no setting names this one.

        Args:
            key: its name in the files.
            name: its name in the network, which settings may use instead.

        Raises:
            BadInput: it is such a weight, which other programs would look for among the coded ones.
        """
        path, settings = key.removesuffix(".weight"), settings_of(self.folder)
        named = self.format.names_coded or _names(settings, path) or _names(settings, name.removesuffix(".weight"))
        if _NUMBER.sub(".*.", path) in self._kinds and not named:
            raise BadInput(
                f"it holds {path} as plain floats, but the same layer of other blocks as {self.format.name}, and no "
                f"setting of its quantization_config names it; use the files of one model, or name the layer there "
                f"under {self.format.left_out}"
            )

    @cached_property
    def _kinds(self) -> set[str]:
        """The paths of coded layers, for any block."""
        return {_NUMBER.sub(".*.", layer.path) for layer in self.layers}

    def _pieces(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Piece]:
        """Weights of these files by the names that they have in the publisher's."""
        pieces = {}
        for name, shape in shapes.items():
            names = self.format.published(name, shape)
            if len(names) == 1:
                pieces[names[0]] = Piece(name, shape)
            else:
                pieces |= {each: Piece(name, shape[1:], expert) for expert, each in enumerate(names)}
        return pieces

    def _decode(self, layer: Layer, expert: int | None, turned: bool) -> Tensor:
        tensors = self._checkpoint.read_all(layer.names.values())
        parts = {end: tensors[name] for end, name in layer.names.items()}
        if expert is not None:
            parts = {end: bank[expert] for end, bank in parts.items()}
        weight = self.format.decode(layer.path, parts)
        return weight.T if turned else weight

    def _read(self, piece: Piece) -> Tensor:
        tensor = self._checkpoint.read(piece.name)
        return self.format.restored(piece.name, tensor if piece.expert is None else tensor[piece.expert])


def settings_of(folder: Path) -> Mapping[str, Any] | None:
    """A model folder's declaration of its quantization; None if there is none.

    Raises:
        BadInput: it is not a mapping of settings.
    """
    config = _read(folder / "config.json")
    if converted := mlx.settings_in(config, Checkpoint(folder).writer if has_weights(folder) else None):
        return converted
    for name in _SETTINGS:
        if isinstance(settings := config.get(name), Mapping):
            return settings
        if settings is not None:
            raise BadInput(f"its config.json has {name}={settings!r}, which must be a mapping with a quant_method")
    for name, method in _BESIDE.items():
        if settings := _read(folder / name):
            return {"quant_method": method} | dict(settings)
    return None


def coded_elsewhere(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The tensors among these that are part of a coded layer, and the formats that have such tensors."""
    for name in names:
        if found := list(dict.fromkeys(form.name for form in FORMATS if name.endswith(form.mark))):
            yield name, " or ".join(found)


def check_declared(config: Any, left_over: Iterable[str]) -> None:
    """Refuse files that hold coded layers beside a configuration without their format.

    Args:
        config: the network's.
        left_over: tensors of the files that no weight of the network uses.

    Raises:
        BadInput: there is such a layer.
    """
    if any(getattr(config, name, None) is not None for name in _SETTINGS):
        return
    for name, form in coded_elsewhere(sorted(left_over)):
        raise BadInput(
            f"it holds {name}, which is part of a layer in the format {form}, but its config.json has no "
            "quantization_config that describes it; copy the config.json that belongs to these weights"
        )


def _names(settings: Any, path: str) -> bool:
    """Whether a setting, at any depth, contains a layer's path, a part of it, or a pattern that it matches."""
    if isinstance(settings, Mapping):
        return any(_names(one, path) for pair in settings.items() for one in pair)
    if isinstance(settings, list):
        return any(_names(one, path) for one in settings)
    if not isinstance(settings, str):
        return False
    text = settings.removeprefix("re:").removeprefix("-:").removeprefix("+:")
    try:
        return bool(text) and (f".{text}." in f".{path}." or re.match(text, path) is not None)
    except re.error:
        return fnmatchcase(path, text)  # such as *.mlp.gate


def readable() -> list[str]:
    """The values of ``quant_method`` that are read here."""
    return list(dict.fromkeys(name.split("_")[0] for form in _READ for name in form.methods))


def is_compressed(config: Mapping[str, Any]) -> bool:
    """Whether a configuration names a format that is decoded here."""
    settings = (mlx.settings_in(config), *(config.get(name) for name in _SETTINGS))
    return any(isinstance(one, Mapping) and _format(one) is not None for one in settings)


def _format(settings: Mapping[str, Any]) -> type[Format] | type[AutoRound] | None:
    method = str(settings.get("quant_method"))
    if method == "bitsandbytes":
        method += "_8bit" if settings.get("load_in_8bit") else "_4bit"
    return next((one for one in _READ if method in one.methods), None)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # the code that needs the file reports the error
    return content if isinstance(content, Mapping) else {}
