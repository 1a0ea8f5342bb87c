"""A model that stays on disk: a skeleton of its network, into which weights are loaded while they are needed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from knowledge_compression.errors import BadInput, ModelUnavailable, first_line
from knowledge_compression.heavy import nn, torch
from knowledge_compression.models.model import Model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

INDEX, SINGLE = _WEIGHTS = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Described:
    """A tensor of a safetensors file, from its header.

    Attributes:
        shape: its sizes.
        dtype: the file's name for it, e.g. ``F16``, ``I32``, ``F8_E4M3``.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def floats(self) -> bool:
        """Whether it holds floating-point numbers."""
        return "F" in self.dtype  # F32, BF16, F8_E4M3, ...

    @property
    def plain(self) -> bool:
        """Whether it holds floating-point numbers that need no scale, of 16 bits or more."""
        return self.floats and not self.dtype.startswith(("F8", "F4"))

    @property
    def count(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of all its numbers."""
        width = re.search(r"\d+", self.dtype)
        return self.count * (int(width[0]) if width else 8) // 8  # BOOL contains no number of bits

    def matrix(self, name: str) -> tuple[int, int]:
        """Its two sizes.

        Raises:
            BadInput: it has more or fewer, or one of them is 0.
        """
        if len(self.shape) != 2 or 0 in self.shape:
            raise BadInput(f"{name} has the shape {list(self.shape)}, but a linear layer's weight has two dimensions")
        return self.shape[0], self.shape[1]


class Checkpoint:
    """The safetensors of a model folder, read tensor by tensor.

    Every read reopens its file: pages of a file that stays mapped would count as this process's memory.
    """

    def __init__(self, folder: Path) -> None:
        """Read the index of tensors and files.

        Raises:
            ModelUnavailable: there are no weights, or the index cannot be read or points outside the folder.
        """
        self.folder = folder
        if (folder / SINGLE).is_file():  # which from_pretrained prefers
            with self._opened(SINGLE) as file:
                self.file_of: dict[str, str] = dict.fromkeys(file.keys(), SINGLE)
        elif (folder / INDEX).is_file():
            try:
                self.file_of = dict(json.loads((folder / INDEX).read_bytes())["weight_map"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise ModelUnavailable(
                    f"{folder / INDEX} cannot be read ({first_line(error)}); it must name the file of each weight, as "
                    "save_pretrained writes it: copy it again"
                ) from None
        else:
            raise ModelUnavailable(f"{folder} holds no safetensors weights: neither {SINGLE} nor {INDEX}")
        if outside := [name for name in self.file_of.values() if not isinstance(name, str) or Path(name).name != name]:
            raise ModelUnavailable(f"{folder / INDEX} refers to a file outside its folder: {outside[0]}")

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, memory-mapped until it is copied.

        Raises:
            ModelUnavailable: its file is missing or incomplete.
        """
        return self.read_all([name])[name]

    def read_all(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors, as from :meth:`read`; each file is opened once."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.file_of[name], []).append(name)
        found: dict[str, Tensor] = {}
        for path, inside in by_file.items():
            with self._opened(path) as file:
                found |= {name: file.get_tensor(name) for name in inside}
        return found

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum((self.folder / name).stat().st_size for name in set(self.file_of.values()))

    @property
    def writer(self) -> str | None:
        """What the metadata of the files call their format: ``pt``, ``mlx``; None if they do not say."""
        for path in self.file_of.values():
            with self._opened(path) as file:
                return (file.metadata() or {}).get("format")
        return None

    def described(self) -> dict[str, Described]:
        """Shape and type of each tensor, from the files' headers alone.

        Raises:
            ModelUnavailable: a file is missing or incomplete, or lacks a tensor that the index assigns to it.
        """
        found = {}
        for path in dict.fromkeys(self.file_of.values()):
            with self._opened(path) as file:
                for name in (name for name, its in self.file_of.items() if its == path):
                    part = file.get_slice(name)
                    found[name] = Described(tuple(part.get_shape()), part.get_dtype())
        return found

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        path = self.folder / name
        try:
            with safe_open(path, "pt") as file:
                yield file
        except OSError as error:
            raise ModelUnavailable(f"{path} cannot be read ({first_line(error)})") from None
        except SafetensorError as error:
            raise ModelUnavailable(
                f"{path} is damaged or cut short ({first_line(error)}); copy the whole file again"
            ) from None


@dataclass
class StreamedModel(Model):
    """A :class:`Model` whose network is a skeleton on the meta device, except for buffers that are in no checkpoint.

    Attributes:
        checkpoint: the files of the weights.
        place: device to which they are loaded.
        stored: floating dtype in which they are processed and written.

    For each weight of the network, ``source`` is the weight to which it is tied (itself if it is not tied),
    ``stored_as`` its name in a checkpoint, and ``parts`` the tensors of the files from which it is made (banks of
    experts are stored expert by expert).
    """

    checkpoint: Checkpoint = field(kw_only=True)
    place: torch.device = field(kw_only=True)
    stored: torch.dtype = field(kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a checkpoint that lacks a weight, and a network in which several blocks have the same weights."""
        names, tied = self.network.state_dict().keys(), self.network.all_tied_weights_keys
        block_of = self.architecture.roles(self.network).block_of
        if self.architecture.shared_depth or any(map(block_of, tied)):
            raise BadInput(f"{self.name} uses weights in several blocks, which cannot be streamed; load it whole")
        stored = names_in_files(self.network, self.checkpoint.file_of)
        self.parts = parts_in_files(self.network, self.checkpoint.file_of)
        stored |= dict.fromkeys(self.parts, "")
        self.stored_as = {name: stored.get(name, name) for name in names}
        # A tied weight is stored once, under the name of the weight to which it is tied.
        self.source = {name: name if name in stored else tied.get(name, name) for name in names}
        if missing := [name for name, source in self.source.items() if source not in stored]:
            raise BadInput(f"{self.checkpoint.folder} lacks the weight {missing[0]} (and {len(missing) - 1} others)")
        self._check_shapes()
        if f"{self.architecture.final}.weight" in stored:
            self.untie_head()  # like from_pretrained with a checkpoint that has its own head

    def _check_shapes(self) -> None:
        """Refuse weights that do not fit the network; streaming would copy them unchecked."""
        there, needed = self.checkpoint.described(), self.network.state_dict()
        for name, source in self.source.items():
            keys = self.parts[source].keys if source in self.parts else [self.stored_as[source]]
            shape = self._shape(source, there)
            floats, wanted = all(there[key].floats for key in keys), tuple(needed[name].shape)
            if shape != wanted or (needed[name].is_floating_point() and not floats):
                kind = "" if floats else " of integers"
                what = keys[0] + (f" and {len(keys) - 1} more" if keys[1:] else "")
                raise BadInput(
                    f"{self.checkpoint.folder} holds {what} of shape {list(shape)}{kind}, and its configuration "
                    f"describes {list(wanted)}"
                )

    def _shape(self, name: str, there: Mapping[str, Described]) -> tuple[int, ...]:
        """The shape of a weight in the files; () if its parts do not fit together."""
        try:
            return tuple(self.assembled(name, lambda key: torch.empty(there[key].shape, device="meta")).shape)
        except (RuntimeError, KeyError, IndexError):
            return ()

    @property
    def device(self) -> torch.device:
        """The device to which weights are loaded."""
        return self.place

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.stored

    def names_inside(self, path: str) -> list[str]:
        """Names of the weights inside a module."""
        return [name for name in self.source if name.startswith(f"{path}.")]

    def names_outside(self, paths: Sequence[str]) -> list[str]:
        """Names of all weights outside some modules."""
        return [name for name in self.source if not name.startswith(tuple(f"{path}." for path in paths))]

    def read(self, name: str) -> Tensor:
        """One weight in the stored dtype on the CPU, memory-mapped if its file has the same dtype."""
        source = self.source[name]
        there = self.checkpoint.read_all(self.parts[source].keys) if source in self.parts else {}
        tensor = self.assembled(source, there.__getitem__ if there else self.checkpoint.read)
        return tensor.to(self.stored) if tensor.is_floating_point() else tensor

    def assembled(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """One weight of the network, made from tensors of the files as transformers does it.

        Args:
            name: name of the weight.
            read: returns the tensor of the files with a given name.
        """
        if name not in self.parts:
            return read(self.stored_as[name])
        converter = deepcopy(self.parts[name].converter)
        for key, pattern in zip(self.parts[name].keys, self.parts[name].patterns, strict=True):
            converter.add_tensor(name, key, pattern, read(key))
        made = converter.convert(name, model=self.network, config=self.network.config)[name]
        return made[0] if isinstance(made, list) else made

    def taken_apart(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the network under the names of a checkpoint, split as by ``save_pretrained``."""
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            if name in self.parts:
                parts = revert_weight_conversion(self.network, {name: tensor})
                found |= {key: part.clone(memory_format=torch.contiguous_format) for key, part in parts.items()}
            else:
                found[self.stored_as[name]] = tensor
        return found

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Load copies of weights into the network, and remove them again on exit."""
        for name, tensor in weights.items():
            _put(self.network, name, tensor.to(self.place, copy=True))
        try:
            yield
        finally:
            for name, tensor in weights.items():
                _put(self.network, name, torch.empty_like(tensor, device="meta"))


def check_kinds(network: PreTrainedModel, folder: Path) -> None:
    """Refuse integers in place of weights, which a loader would use as if they were weights.

    Args:
        network: the loaded network; one whose configuration says that it is quantized may hold integers.
        folder: its folder; without safetensors nothing is checked.

    Raises:
        BadInput: there is such a tensor; the message names it.
        ModelUnavailable: a file cannot be read, or is outside the folder.
    """
    if getattr(network.config, "quantization_config", None) or not has_weights(folder):
        return
    there = Checkpoint(folder).described()
    needed = network.state_dict()
    for name, key in names_in_files(network, there).items():
        if name in needed and needed[name].is_floating_point() and not there[key].floats:
            raise BadInput(f"it holds {key} as integers, without a quantization_config that describes them")


def has_weights(folder: Path) -> bool:
    """Whether a folder holds safetensors that from_pretrained finds."""
    return any((folder / name).is_file() for name in _WEIGHTS)


def names_in_files(network: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """For each weight of the network that transformers has since renamed, its name in the files."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(network)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    conversions: list[Any] = [step for step in steps if not isinstance(step, WeightRenaming)]
    names, weights = {}, network.state_dict()
    for key in keys:
        name, converted = rename_source_key(key, renamings, conversions, network.base_model_prefix, weights)
        if converted is None:  # a weight that is assembled from several is not in the files
            names[name] = key
    return names


class Parts(NamedTuple):
    """The tensors of files from which one weight of a network is made.

    Attributes:
        keys: their names.
        patterns: for each name, the pattern of the converter that it matches.
        converter: transformers' converter, which combines them.
    """

    keys: list[str]
    patterns: list[str]
    converter: Any


def parts_in_files(network: PreTrainedModel, keys: Iterable[str]) -> dict[str, Parts]:
    """Each weight of the network made from several tensors of the files, or from one of another name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    steps = get_model_conversion_mapping(network)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    conversions: list[Any] = [step for step in steps if not isinstance(step, WeightRenaming)]
    by_pattern = {pattern: step for step in conversions for pattern in step.source_patterns}
    parts: dict[str, Parts] = {}
    weights = network.state_dict()
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, conversions, network.base_model_prefix, weights)
        if pattern is not None and name in weights:
            found = parts.setdefault(name, Parts([], [], by_pattern[pattern]))
            found.keys.append(key)
            found.patterns.append(pattern)
    return parts


def _put(network: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer by its full name, on any device."""
    path, _, leaf = name.rpartition(".")
    module = network.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(
            tensor, requires_grad=tensor.is_floating_point()
        )  # like loaded parameters
    else:
        module._buffers[leaf] = tensor
