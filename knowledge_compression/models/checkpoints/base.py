"""The interface of a format of quantized weights, and the record of a compressed file.

A format in safetensors is a class in its own module: it declares which values of ``quant_method`` name it, which
tensors form one layer, and which floats they represent by the format's published definition. Everything else (reading,
loading, checking, reporting) is common to all formats.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from knowledge_compression.errors import BadInput
from knowledge_compression.models.streamed import Described

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Coded:
    """One weight as a file stores it.

    Attributes:
        shape: of the weight that it represents, as in the network's linear layer: ``[out_features, in_features]``.
        bits: bits of the code of one weight.
        group: number of weights that share one scale; None if that varies, or there is no scale.
        kind: the format's name for this coding if it has several, e.g. ``Q4_K``.
    """

    shape: tuple[int, ...]
    bits: float
    group: int | None = None
    kind: str = ""

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class Format(ABC):
    """A format of quantized weights in safetensors, with the settings of one checkpoint.

    Attributes:
        name: its name in records and messages.
        methods: the values of ``quantization_config.quant_method`` by which it is recognised.
        mark: ending of the tensor that identifies a layer in this format.
        endings: endings of all tensors of one layer that are read, including the mark.
        weight: ending of the weight that they represent.
        telling: endings of small tensors that determine its shape and are read first.
        left_out: the setting of ``quantization_config`` that names the layers stored as plain floats.
    """

    name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    mark: ClassVar[str]
    endings: ClassVar[tuple[str, ...]]
    weight: ClassVar[str] = ".weight"
    telling: ClassVar[tuple[str, ...]] = ()
    left_out: ClassVar[str] = "modules_to_not_convert"

    @classmethod
    @abstractmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The format with a checkpoint's ``quantization_config``.

        Raises:
            BadInput: the variant cannot be read.
        """

    @abstractmethod
    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """The weight that a layer's tensors represent, determined from their headers.

        Args:
            layer: its path.
            parts: its tensors by their endings.
            told: the values of those in :attr:`telling`.

        Raises:
            BadInput: their shapes or dtypes contradict one another.
        """

    @abstractmethod
    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The floats that a layer's tensors represent, float32, in the shape given by :meth:`coded`."""

    def configuration(self, config: PretrainedConfig) -> PretrainedConfig:
        """The configuration of the network that the weights are for, given that of the folder."""
        return config

    def published(self, name: str, shape: Sequence[int]) -> Sequence[str]:
        """The name of a weight in the files that the model's publisher made.

        Args:
            name: its name here.
            shape: its own, or that of the weight that its codes represent.

        Returns:
            One name, or for a bank of experts, ``[experts, ...]``, that of each expert.
        """
        return [name]

    def restored(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that is stored as floats, in the publisher's layout."""
        return tensor

    @property
    def may_be_floats(self) -> bool:
        """Whether the settings allow that no layer is coded."""
        return False

    @property
    def names_coded(self) -> bool:
        """Whether the settings name the layers that are coded, so that they need not name those stored as floats."""
        return False

    @property
    def made_by(self) -> str:
        """The program that made the file, if the file states it; otherwise empty."""
        return ""

    @property
    def notes(self) -> Sequence[str]:
        """A remark for readers: effects of the format at run time that decoded weights do not have; may be empty."""
        return ()


@dataclass(frozen=True)
class StoredAs:
    """The description of a compressed file, for the record.

    Attributes:
        format: e.g. ``gptq``.
        bits: mean bits of the code of one weight, over the weights that are coded.
        layer_bits: the same including scales, zero points and everything else stored for them.
        model_bits: bits of all weights in the files over the number of the network's parameters.
        group: number of weights that share one scale; None if that varies.
        bytes: size of the weights' files on disk.
        weights: number of weights in each coding, e.g. ``{"Q4_K": 1000, "F32": 10}``.
        made_by: the program that made it, according to the file; may be empty.
        notes: remarks for readers.
    """

    format: str
    bits: float
    layer_bits: float
    model_bits: float
    group: int | None
    bytes: int
    weights: Mapping[str, int]
    made_by: str = ""
    notes: Sequence[str] = field(default=())

    @classmethod
    def of(
        cls,
        name: str,
        coded: Sequence[tuple[Coded, int]],
        rest: Mapping[str, int],
        *,
        tensors: int,
        files: int,
        made_by: str = "",
        notes: Sequence[str] = (),
    ) -> StoredAs:
        """The record of a checkpoint.

        Args:
            name: name of the format.
            coded: the coded weights, and the number of bytes stored for each.
            rest: number of weights stored as plain numbers, by dtype.
            tensors: bytes of all tensors.
            files: bytes of all files.
            made_by, notes: as above.
        """
        weights = Counter(rest)
        for one, _ in coded:
            weights[one.kind or f"{one.bits:g} bits"] += one.parameters
        count = sum(one.parameters for one, _ in coded)
        groups = {one.group for one, _ in coded}
        return cls(
            format=name,
            bits=sum(one.bits * one.parameters for one, _ in coded) / count if count else 0.0,
            layer_bits=sum(8 * size for _, size in coded) / count if count else 0.0,
            model_bits=8 * tensors / max(1, sum(weights.values())),
            group=groups.pop() if len(groups) == 1 else None,
            bytes=files,
            weights=dict(weights),
            made_by=made_by,
            notes=tuple(notes),
        )


def rounded_at_run_time(what: Sequence[str]) -> Sequence[str]:
    """The remark that what a file wants rounded at run time, besides its weights, is not rounded here."""
    return (f"it is meant to be used with rounded {' and '.join(what)}, which is not done here",) if what else ()


def fits(layer: str, what: str, there: Sequence[int], wanted: Sequence[int]) -> None:
    """Refuse a tensor whose shape contradicts the layer's other tensors.

    Raises:
        BadInput: the shapes do not fit; the message contains both.
    """
    if tuple(there) != tuple(wanted):
        raise BadInput(f"{layer}{what} has the shape {list(there)}, but its other tensors require {list(wanted)}")


def needed(layer: str, parts: Mapping[str, Any], *endings: str) -> None:
    """Refuse a layer that lacks one of its tensors.

    Raises:
        BadInput: a tensor is missing; the message names it.
    """
    for ending in endings:
        if ending not in parts:
            raise BadInput(
                f"it holds {layer}{next(iter(parts))} but not {layer}{ending}, without which the layer cannot be "
                f"decoded"
            )


def other_layout(layer: str, declared: str, other: str) -> BadInput:
    """The refusal of a layer whose tensors have the names of the declared format and the shapes of another one."""
    return BadInput(
        f"its configuration declares the format {declared}, but the shapes of {layer}.qweight and {layer}.scales are "
        f"those of the format {other}; all layers must be {declared} or plain floats"
    )


def number(settings: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """A whole number from a ``quantization_config``.

    Raises:
        BadInput: it is not a whole number.
    """
    value = settings.get(name, default)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise BadInput(f"its quantization_config has {name}={value!r}, which must be a whole number")
    return value
