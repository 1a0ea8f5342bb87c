"""What a format of quantized weights says of itself, and what a record tells of a file in it.

A format in safetensors is a class in a file of its own: which values of ``quant_method`` name it, which tensors
together make one layer, and the floats that they stand for by the format's published definition. All else (reading,
loading, checking, reporting) is the same for all of them.
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


@dataclass(frozen=True)
class Coded:
    """One weight as a file stores it.

    Attributes:
        shape: of the weight that it stands for, as the network's linear layer has it: ``[out_features, in_features]``.
        bits: of the code of one weight.
        group: how many weights share one scale; None where that differs, or there is no scale.
        kind: what the format calls this coding where it has several, e.g. ``Q4_K``.
    """

    shape: tuple[int, ...]
    bits: float
    group: int | None = None
    kind: str = ""

    @property
    def parameters(self) -> int:
        """How many weights."""
        return math.prod(self.shape)


class Format(ABC):
    """A format of quantized weights in safetensors, with the settings of one checkpoint.

    Attributes:
        name: what records and messages call it.
        methods: the values of ``quantization_config.quant_method`` by which it is recognised.
        mark: ending of the tensor whose presence makes a layer one of this format.
        endings: endings of all the tensors of one layer that are read, the mark among them.
        weight: ending of the weight that they stand for.
        telling: endings of small tensors that say of what shape it is, which are read beforehand.
    """

    name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]
    mark: ClassVar[str]
    endings: ClassVar[tuple[str, ...]]
    weight: ClassVar[str] = ".weight"
    telling: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The format with a checkpoint's ``quantization_config``.

        Raises:
            BadInput: a variant that is not read.
        """

    @abstractmethod
    def coded(self, layer: str, parts: Mapping[str, Described], told: Mapping[str, Tensor]) -> Coded:
        """What a layer's tensors stand for, from their headers alone.

        Args:
            layer: its path.
            parts: its tensors by their endings.
            told: those of :attr:`telling`, read.

        Raises:
            BadInput: their shapes or types do not fit each other.
        """

    @abstractmethod
    def decode(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The floats that a layer's tensors stand for, float32, in the shape that :meth:`coded` says."""

    @property
    def made_by(self) -> str:
        """What program made the file, by its own word; empty where it does not say."""
        return ""

    @property
    def notes(self) -> Sequence[str]:
        """What a reader must know: what the format does at run time that decoded weights do not show."""
        return ()


@dataclass(frozen=True)
class StoredAs:
    """What a compressed file is, for the record.

    Attributes:
        format: e.g. ``gptq``.
        bits: mean bits of the code of one weight, over the weights that are coded.
        layer_bits: the same with scales, zero points and everything else that is stored for them.
        model_bits: bits of all weights in the files over the number of the network's parameters.
        group: how many weights share one scale; None where that differs.
        bytes: of the weights' files on disk.
        weights: how many weights are coded in each way, e.g. ``{"Q4_K": 1000, "F32": 10}``.
        made_by: what program made it, by the file's own word; may be empty.
        notes: what a reader must know of it.
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
            name: of the format.
            coded: the weights that are coded, and how many bytes are stored for each.
            rest: how many weights are stored as plain numbers, by type.
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


def fits(layer: str, what: str, there: Sequence[int], wanted: Sequence[int]) -> None:
    """Refuse a tensor of another shape than the layer's other tensors ask for.

    Raises:
        BadInput: names both shapes.
    """
    if tuple(there) != tuple(wanted):
        raise BadInput(f"{layer}{what} has the shape {list(there)}, and its other tensors ask for {list(wanted)}")


def needed(layer: str, parts: Mapping[str, Any], *endings: str) -> None:
    """Refuse a layer that lacks one of its tensors.

    Raises:
        BadInput: names it.
    """
    for ending in endings:
        if ending not in parts:
            raise BadInput(
                f"it holds {layer}{next(iter(parts))} and not {layer}{ending}, without which nothing is read"
            )


def number(settings: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """A whole number of a ``quantization_config``.

    Raises:
        BadInput: it is another kind of value.
    """
    value = settings.get(name, default)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise BadInput(f"its quantization_config has {name}={value!r}, which should be a whole number")
    return value
