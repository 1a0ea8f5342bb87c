"""Where files hold the layers of a network: other programs store the experts of a bank one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from knowledge_compression.heavy import nn, torch
from knowledge_compression.models import TargetLayer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Place:
    """A matrix ``[out_features, in_features]`` as files hold it.

    Attributes:
        path: the name of its weight in the files without ``.weight``.
        shape: outputs and inputs.
        role: the role of the layer.
        kind: the class of the module that uses it, ``Linear`` for a matrix of an expert.
        start: its first row in the layer, which is larger than this matrix if an expert's gate and up projections are
            one parameter.
    """

    path: str
    shape: tuple[int, int]
    role: str
    kind: str
    start: int = 0

    @property
    def outputs(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def inputs(self) -> int:
        """Number of columns."""
        return self.shape[1]

    @property
    def rows(self) -> tuple[int, int]:
        """Its rows in the layer, first and past the last."""
        return self.start, self.start + self.outputs


def places_of(layers: Iterable[TargetLayer]) -> dict[TargetLayer, list[Place]]:
    """The places of layers; empty for a layer that files do not hold as the matrix of a linear layer."""
    banks: dict[str, Mapping[int, list[tuple[str, int, int]]]] = {}
    found: dict[TargetLayer, list[Place]] = {}
    for layer in layers:
        outputs, inputs = layer.weight.shape
        if layer.expert is None:
            plain = isinstance(layer.module, nn.Linear) or layer.is_replaced
            kind = "Linear" if plain else type(layer.module).__name__
            paths = (layer.path, *layer.copies) if layer.is_replaceable else ()
            found[layer] = [Place(path, (outputs, inputs), layer.role, kind) for path in paths]
            continue
        if layer.weight_name not in banks:
            banks[layer.weight_name] = _matrices(layer)
        matrices = banks[layer.weight_name].get(layer.expert.number, [])
        found[layer] = [Place(path, (rows, inputs), layer.role, "Linear", start) for path, start, rows in matrices]
    return found


def stored_names(network: Any, path: str) -> list[str]:
    """The paths in files of a layer with a weight: transformers saves Mixtral's ``mlp.gate`` by an older name, say."""
    from transformers.core_model_loading import revert_weight_conversion

    weight = getattr(network.get_submodule(path), "weight", None)
    if weight is None:
        return []
    saved: Mapping[str, Tensor] = revert_weight_conversion(network, {f"{path}.weight": weight})
    return [name.removesuffix(".weight") for name in saved if name.endswith(".weight")]


def _matrices(layer: TargetLayer) -> Mapping[int, list[tuple[str, int, int]]]:
    """For each expert of a layer's bank, the paths of its matrices, the first row of each and the number of its rows.

    Transformers' own saving is applied to the parameter, with row numbers in place of weights.
    """
    from transformers.core_model_loading import revert_weight_conversion

    assert layer.expert is not None
    if layer.expert.transposed:
        return {}
    network: Any = layer.network
    height, count = len(layer.weight), len(getattr(layer.module, layer.expert.parameter))
    numbers = torch.arange(count * height).view(count, height, 1)
    saved: Mapping[str, Tensor] = revert_weight_conversion(network, {layer.weight_name: numbers})
    experts: dict[int, list[tuple[str, int, int]]] = {number: [] for number in range(count)}
    for name, part in saved.items():
        first = int(part.flatten()[0])
        neighbours = torch.equal(part.flatten(), torch.arange(first, first + part.numel()))
        number, start = divmod(first, height)
        if part.dim() != 2 or not neighbours or start + len(part) > height or not name.endswith(".weight"):
            return {}
        experts[number].append((name.removesuffix(".weight"), start, len(part)))
    return experts
