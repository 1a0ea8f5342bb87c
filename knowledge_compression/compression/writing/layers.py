"""Formats in which each coded layer is a few tensors and everything else is stored as floating-point numbers."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.solve.coding import INT8, CodedWeight, Coding
from knowledge_compression.compression.solve.grid import quantized_weight
from knowledge_compression.compression.writing.base import Writer
from knowledge_compression.compression.writing.places import Place, places_of, stored_names
from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import torch
from knowledge_compression.models import Model, TargetLayer, Targets
from knowledge_compression.models.targets import is_linear, linear_layers

if TYPE_CHECKING:
    from torch import Tensor

NEIGHBOURS = "the inputs of a group in {} are neighbours; choose compression.static_groups=true"
_OWN_MODULES = "experts that round their inputs are not saved as codes"
_NARROW = ("float16", "bfloat16")


class LayerWriter(Writer):
    """A format that stores a few tensors for each coded layer, and describes them in ``config.json``.

    Attributes:
        name: its name in ``output.save_model``.
        beside: name of a further file that holds the same settings, if the format has one.
    """

    name: ClassVar[str]
    beside: ClassVar[str | None] = None

    @abstractmethod
    def unfit(self, coding: Coding, place: Place) -> str | None:
        """Why the format cannot hold a matrix with such codes; None if it can."""

    @abstractmethod
    def tensors(self, weight: CodedWeight, floats: torch.dtype) -> Mapping[str, Tensor]:
        """The tensors of one matrix, by the endings of their names.

        Args:
            weight: its codes.
            floats: the type in which everything else is stored.
        """

    @abstractmethod
    def settings(self, coded: Mapping[Place, Coding], left: Mapping[str, str | None]) -> dict[str, Any]:
        """The ``quantization_config``.

        Args:
            coded: the matrices that are stored in the format.
            left: the paths of all other matrices of linear layers, and their roles; None for a matrix without a role.

        Raises:
            BadInput: the matrices differ in a setting of which the format has only one.
        """

    def runs_in(self, coded: Mapping[Place, Coding], floats: torch.dtype) -> torch.dtype:
        """The type in which other programs load the model by default: that of everything that is not coded."""
        return floats

    def refusal(self, compression: Compression, targets: Targets) -> str | None:
        """Why it refuses weights without codes, or layers whose codes do not fit into the format."""
        if (coding := compression.coding) is None:
            asked = f"; choose {compression.for_codes}" if compression.for_codes else ""
            return f"compression={compression.name} makes no codes that {self.name} can hold{asked}"
        places = places_of(targets)
        return next((why for layer in targets if (why := self._unfit(coding, layer, places[layer]))), None)

    def _unfit(self, coding: Coding, layer: TargetLayer, places: Sequence[Place]) -> str | None:
        if not places:
            return (
                f"{self.name} holds linear layers, and {layer.path} ({layer.role}) is neither a linear layer nor "
                "stored as one in files of this model type; leave it out of the target, e.g. target=att"
            )
        if layer.expert and coding.activations:
            other = "a target without experts" if coding.kind == INT8 else "compression.activations=false"
            return f"{_OWN_MODULES}, as {layer.path}; choose {other}"
        for place in places:
            if place.start % (coding.block[0] or 1):
                return (
                    f"files hold the outputs of {layer.path} in parts of {place.outputs}, and blocks of "
                    f"{coding.block[0]} outputs do not end there"
                )
            if coding.block[0] == 1 and place.inputs % (coding.group or place.inputs):
                return (
                    f"{self.name} has groups of one size, and {coding.group} does not divide the {place.inputs} inputs "
                    f"of {place.path}"
                )
            if why := self.unfit(coding, place):
                return why
        return None

    def plain_linear(self, place: Place) -> str | None:
        """Why a format of ``nn.Linear`` layers cannot hold a matrix; None if it can."""
        return None if place.kind == "Linear" else f"{self.name} holds nn.Linear, and {place.path} is {place.kind}"

    def write(self, model: Model, folder: Path) -> Mapping[str, Any]:
        """Save the codes of coded layers, and everything else in the narrowest type that holds it exactly."""
        from knowledge_compression.models.replaced import ReplacedExperts
        from knowledge_compression.models.saving import full_state, write_checkpoint

        if any(isinstance(part, ReplacedExperts) for part in model.network.modules()):
            raise BadInput(f"{model.name} cannot be saved as {self.name}: {_OWN_MODULES}")
        layers = linear_layers(model)
        weights = {layer: found for layer in layers if (found := quantized_weight(layer)) is not None}
        if not weights:
            raise BadInput(f"{model.name} has no layer whose weights come from codes, and {self.name} holds codes")
        banks = {layer.weight_name for layer in weights}  # possibly only a part of it is coded
        copies = {f"{path}.weight" for layer in weights for path in layer.copies}
        places = places_of(layers)
        for layer, weight in weights.items():
            if why := self._unfit(weight.coding, layer, places[layer]):
                raise BadInput(f"{model.name} cannot be saved as {self.name}: {why}")
        coded = alike({place: weight.coding for layer, weight in weights.items() for place in places[layer]})
        settings = self.settings(coded, _left(model, layers, places, {place.path for place in coded}))
        state = full_state(model.network)
        for name in banks | copies:
            del state[name]
        for layer, parts in places.items():
            if layer not in weights and layer.weight_name in banks:
                state |= {f"{part.path}.weight": layer.weight[slice(*part.rows)].contiguous() for part in parts}
        floats = exact_type(state, model.dtype)
        state = narrowed(state, floats)
        for layer, weight in weights.items():
            for part in places[layer]:
                tensors = self.tensors(weight.rows(*part.rows), floats)
                # Copies, as parts of one layer may share a scale, and no two entries of a checkpoint share memory.
                state |= {f"{part.path}{ending}": tensor.clone() for ending, tensor in tensors.items()}
        declared = {"quantization_config": settings, "dtype": str(self.runs_in(coded, floats)).removeprefix("torch.")}
        files = {self.beside: json.dumps(settings, indent=2) + "\n"} if self.beside else {}
        write_checkpoint(model, folder, state, declared, files)
        return {}


def _left(
    model: Model, layers: Sequence[TargetLayer], places: Mapping[TargetLayer, Sequence[Place]], coded: set[str]
) -> dict[str, str | None]:
    """The paths of matrices that are not coded, and their roles: those in the files, and those in the network.

    Experts are named one by one, and where none of them is coded, together too: vLLM has one module for all, which it
    looks up by either name.
    """
    roles = {layer.path: layer.role for layer in layers if layer.expert is None}
    experts = {layer.path for layer in layers if layer.expert}
    linears = [path for path, part in model.network.named_modules() if is_linear(part) and path not in experts]
    left: dict[str, str | None] = {path: roles.get(path) for path in dict.fromkeys([*linears, *roles])}
    left |= {name: role for path, role in left.items() for name in stored_names(model.network, path)}
    left |= {place.path: place.role for parts in places.values() for place in parts}
    for layer, parts in places.items():
        if layer.expert:
            together = parts[0].path.rsplit(".", 2)[0] if parts else layer.weight_name.rsplit(".", 1)[0]
            if not any(path.startswith(f"{together}.") for path in coded):
                left[together] = layer.role
    return {path: role for path, role in left.items() if path not in coded}


def exact_type(state: Mapping[str, Tensor], own: torch.dtype) -> torch.dtype:
    """The narrowest of float16, bfloat16 and a network's own type that holds all its floating-point tensors exactly."""
    floats = [tensor for tensor in state.values() if tensor.is_floating_point()]
    for dtype in (getattr(torch, name) for name in _NARROW):
        if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in floats):
            found: torch.dtype = dtype
            return found
    return own


def narrowed(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in another type; those that are one tensor stay one, so that they are saved once."""
    made: dict[tuple[Any, ...], Tensor] = {}
    for tensor in state.values():
        if tensor.is_floating_point() and (key := _which(tensor)) not in made:
            made[key] = tensor.to(dtype)
    return {name: made.get(_which(tensor), tensor) for name, tensor in state.items()}


def _which(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def half_filled(bits: int, place: Place) -> str | None:
    """Why the codes of a matrix do not fill whole words along its outputs and inputs; None if they do."""
    for name, count in (("outputs", place.outputs), ("inputs", place.inputs)):
        if count * bits % 32:
            return f"the {count} {name} of {place.path} do not fill whole words of 32 bits with {bits} bits each"
    return None


def same(what: str, values: Sequence[Any]) -> Any:
    """The value that all layers share.

    Raises:
        BadInput: they differ.
    """
    if len(found := set(values)) > 1:
        raise BadInput(f"the format has one {what} for all layers, and they have {sorted(found, key=str)}")
    return found.pop()


def alike(coded: Mapping[Place, Coding]) -> dict[Place, Coding]:
    """The same, but layers with one group per row get its size as group size if others have several groups."""
    if all(coding.group is None for coding in coded.values()):
        return dict(coded)
    rows = {place for place, coding in coded.items() if coding.block == (1, None)}
    return {
        place: replace(coding, block=(1, place.inputs)) if place in rows else coding for place, coding in coded.items()
    }
