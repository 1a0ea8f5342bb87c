"""Formats in which each coded layer is a few tensors and everything else is stored as floating-point numbers."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.solve.coding import CodedWeight, Coding
from knowledge_compression.compression.solve.grid import quantized_weight
from knowledge_compression.compression.writing.base import Writer
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import nn, torch
from knowledge_compression.models import Model, TargetLayer, Targets
from knowledge_compression.models.targets import is_linear, linear_layers

if TYPE_CHECKING:
    from torch import Tensor

NEIGHBOURS = "the inputs of a group in {} are neighbours; choose compression.static_groups=true"
_NARROW = ("float16", "bfloat16")


class LayerWriter(Writer):
    """A format that stores a few tensors for each coded layer, and says in ``config.json`` how to read them.

    Attributes:
        name: as in ``output.save_model``.
        beside: name of a further file that holds the same settings, if the format has one.
    """

    name: ClassVar[str]
    beside: ClassVar[str | None] = None

    @abstractmethod
    def unfit(self, coding: Coding, layer: TargetLayer) -> str | None:
        """Why the format cannot hold a linear layer with such codes; None if it can."""

    @abstractmethod
    def tensors(self, weight: CodedWeight, floats: torch.dtype) -> Mapping[str, Tensor]:
        """The tensors of one layer, by the endings of their names.

        Args:
            weight: the layer's codes.
            floats: the type in which everything else is stored.
        """

    @abstractmethod
    def settings(self, coded: Mapping[TargetLayer, Coding], left: Mapping[str, str | None]) -> dict[str, Any]:
        """The ``quantization_config``.

        Args:
            coded: the layers that are stored in the format.
            left: the paths of all other linear layers of the network, and their roles; None where they have none.

        Raises:
            BadInput: the layers differ in what the format says once for all.
        """

    def runs_in(self, coded: Mapping[TargetLayer, Coding], floats: torch.dtype) -> torch.dtype:
        """The type in which others load the model unless told otherwise: that in which everything else is stored."""
        return floats

    def refusal(self, compression: Compression, targets: Targets) -> str | None:
        """It refuses numbers without codes, and layers whose codes do not fit into it."""
        if (coding := compression.coding) is None:
            return f"compression={compression.name} leaves floating-point numbers, and {self.name} holds codes"
        return next((why for layer in targets if (why := self._unfit(coding, layer))), None)

    def _unfit(self, coding: Coding, layer: TargetLayer) -> str | None:
        if layer.expert or not layer.is_replaceable:
            return f"{self.name} holds linear layers, and {layer.path} is an expert or a router"
        width = layer.weight.shape[1]
        if coding.block[0] == 1 and width % (coding.group or width):
            return (
                f"{self.name} has groups of one size, and {coding.group} does not divide the {width} inputs of "
                f"{layer.path}"
            )
        return self.unfit(coding, layer)

    def plain_linear(self, layer: TargetLayer) -> str | None:
        """Why a format of ``nn.Linear`` layers cannot hold a layer; None if it can."""
        if isinstance(layer.module, nn.Linear):
            return None
        return f"{self.name} holds nn.Linear, and {layer.path} is {type(layer.module).__name__}"

    def write(self, model: Model, folder: Path) -> Mapping[str, Any]:
        """Save the codes of coded layers, and everything else in the narrowest type that holds it exactly."""
        from knowledge_compression.models.saving import full_state, write_checkpoint

        layers = linear_layers(model)
        weights = {layer: found for layer in layers if (found := quantized_weight(layer)) is not None}
        if not weights:
            raise BadInput(f"{model.name} has no layer with codes behind its weights, and {self.name} holds codes")
        coded = {layer: weight.coding for layer, weight in weights.items()}
        for layer, coding in coded.items():
            if why := self._unfit(coding, layer):
                raise BadInput(f"{model.name} cannot be saved as {self.name}: {why}")
        linears = [path for path, part in model.network.named_modules() if is_linear(part)]
        roles, names = {layer.path: layer.role for layer in layers}, {layer.path for layer in coded}
        settings = self.settings(coded, {path: roles.get(path) for path in linears if path not in names})
        state = full_state(model.network)
        for layer in coded:
            del state[layer.weight_name]
        floats = exact_type(state, model.dtype)
        state = {name: tensor.to(floats) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        for layer, weight in weights.items():
            state |= {f"{layer.path}{ending}": tensor for ending, tensor in self.tensors(weight, floats).items()}
        declared = {"quantization_config": settings, "dtype": str(self.runs_in(coded, floats)).removeprefix("torch.")}
        files = {self.beside: json.dumps(settings, indent=2) + "\n"} if self.beside else {}
        write_checkpoint(model, folder, state, declared, files)
        return {}


def exact_type(state: Mapping[str, Tensor], own: torch.dtype) -> torch.dtype:
    """The narrowest of float16, bfloat16 and a network's own type that holds all its floating-point tensors exactly."""
    floats = [tensor for tensor in state.values() if tensor.is_floating_point()]
    for dtype in (getattr(torch, name) for name in _NARROW):
        if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in floats):
            found: torch.dtype = dtype
            return found
    return own


def half_filled(bits: int, layer: TargetLayer, sides: Mapping[str, int]) -> str | None:
    """Why the codes of a layer do not fill whole words along its ``outputs`` and ``inputs``; None if they do."""
    for name, count in sides.items():
        if count * bits % 32:
            return f"the {count} {name} of {layer.path} do not fill whole words of 32 bits with {bits} bits each"
    return None


def same(what: str, values: Sequence[Any]) -> Any:
    """The value that all layers share.

    Raises:
        BadInput: they differ.
    """
    if len(found := set(values)) > 1:
        raise BadInput(f"the format has one {what} for all layers, and they have {sorted(found)}")
    return found.pop()


def group_sizes(coded: Mapping[TargetLayer, Coding]) -> int:
    """The group size that all layers share; -1 if each row of each layer is one group.

    Raises:
        BadInput: they differ.
    """
    if all(coding.group is None for coding in coded.values()):
        return -1
    return int(same("group size", [coding.group or layer.weight.shape[1] for layer, coding in coded.items()]))
