"""The matrices of a network that a compression changes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby
from typing import Annotated

from pydantic import Field

from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import nn
from knowledge_compression.identity import ADDED, LABEL
from knowledge_compression.models.families import FINAL, ROLES, TRANSFORM
from knowledge_compression.models.layers import Expert, TargetLayer, is_linear
from knowledge_compression.models.model import Model

__all__ = ["Expert", "LeftOut", "Placed", "Target", "TargetLayer", "Targets", "is_linear", "linear_layers", "placed"]

READINGS = ("module", "paper")
LIMIT = "limit"
Numbers = Sequence[Annotated[int, Field(ge=0)]]
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class LeftOut:
    """Parameters of the blocks, of two or more dimensions, that a target does not include.

    Attributes:
        path: their name, with ``*`` in place of numbers.
        role: role of the part to which they belong, or None.
        parameters: number of entries.
        share: their share of all such parameters of the network's blocks.
        reason: ``role`` if the target does not include their role, ``limit`` if it is limited to other blocks or
            experts, otherwise their kind, e.g. ``convolution``.
        inside: whether the target includes the role of the part to which they belong, without being limited to others.
    """

    path: str
    role: str | None
    parameters: int
    share: float
    reason: str
    inside: bool


class Targets(Sequence[TargetLayer]):
    """An ordered selection of linear layers, in the order of the network's own modules."""

    def __init__(
        self,
        layers: Sequence[TargetLayer],
        model: Model,
        reading: str = "module",
        *,
        takes_final_when_quantized: bool = False,
        left_out: Sequence[LeftOut] = (),
    ) -> None:
        self._layers = list(layers)
        self.left_out = list(left_out)
        self._model = model
        self._reading = reading
        self.takes_final_when_quantized = takes_final_when_quantized

    def __getitem__(self, index: int) -> TargetLayer:  # type: ignore[override]
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[TargetLayer]:
        return iter(self._layers)

    @cached_property
    def parameters(self) -> int:
        """Number of weights in the selection, each counted once."""
        return sum(layer.parameters for layer in self._layers)

    def follow(self, network: nn.Module, path_now: Callable[[str], str | None]) -> None:
        """Select the remaining layers in a network that has replaced theirs.

        Args:
            network: the new network.
            path_now: returns the new path of a layer, given its former path; None if it was dropped.
        """
        moved = [(layer, path_now(layer.path)) for layer in self._layers]
        self._layers = [layer.moved(network, path) for layer, path in moved if path is not None]
        self.__dict__.pop("parameters", None)

    @property
    def model(self) -> Model:
        """The model whose layers they are."""
        return self._model

    def with_final(self) -> Targets:
        """The same selection with the final layer, as in published quantization of the whole model."""
        if any(layer.role == FINAL for layer in self._layers):
            return self
        final = [layer for layer in linear_layers(self._model, self._reading) if layer.role == FINAL]
        return Targets([*self._layers, *final], self._model, self._reading, left_out=self.left_out)


@dataclass(frozen=True)
class Target:
    """A named choice of roles; one file under ``conf/target/`` each.

    Attributes:
        name: the name in settings.
        roles: the roles that it includes under ``reading=module``.
        paper_roles: the roles that it includes under ``reading=paper``; by default the same.
        final_when_quantized: whether quantization of this target includes the final layer, as published; pruning
            excludes it.
        reading: ``module`` (a linear belongs to the module that contains it) or ``paper`` (as counted in Table 2 of
            paper 1).
        blocks: numbers of the blocks to which it is limited, from 0 in each stack; None includes all blocks, and layers
            outside the blocks.
        experts: numbers of the routed experts to which it is limited, from 0 in each block; None includes all experts,
            and layers that belong to no routed expert.
    """

    name: str = field(metadata=LABEL)
    roles: Sequence[str]
    paper_roles: Sequence[str] | None = None
    final_when_quantized: bool = False
    reading: str = "module"
    blocks: Numbers | None = field(default=None, metadata=ADDED)
    experts: Numbers | None = field(default=None, metadata=ADDED)

    def __post_init__(self) -> None:
        """Refuse unknown roles and readings; numbers count once, in any order."""
        if self.reading not in READINGS:
            raise BadInput(f"reading='{self.reading}' does not exist; choose one of {', '.join(READINGS)}")
        unknown = set(self.roles) | set(self.paper_roles or ())
        if unknown := unknown - set(ROLES):
            raise BadInput(
                f"target={self.name}: no role is called {', '.join(sorted(unknown))}; roles: {', '.join(ROLES)}"
            )

        for name in ("blocks", "experts"):
            if (numbers := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(sorted(set(numbers))))

    def select(self, model: Model) -> Targets:
        """The layers of ``model`` that have one of the roles, in the blocks and experts to which it is limited.

        Raises:
            BadInput: the model has no such layer, or has linear layers that cannot be placed.
        """
        roles = self.paper_roles if self.reading == "paper" and self.paper_roles else self.roles
        everything = placed(model, self.reading)
        layers = everything.layers
        chosen = [layer for layer in layers if layer.role in roles]
        if not chosen:
            there = [role for role in ROLES if any(layer.role == role for layer in layers)]
            raise BadInput(
                f"target={self.name} takes {', '.join(roles)}, which {model.name} ({model.network.config.model_type}) "
                f"does not have; it has {', '.join(there)}"
            )
        limited = self._within_limits(model, chosen)
        return Targets(
            limited,
            model,
            self.reading,
            takes_final_when_quantized=self.final_when_quantized and len(limited) == len(chosen),
            left_out=everything.without(roles, limited),
        )

    def _within_limits(self, model: Model, layers: list[TargetLayer]) -> list[TargetLayer]:
        """The layers in the chosen blocks and of the chosen experts.

        Raises:
            BadInput: there is no block or expert of a chosen number.
        """
        limits: list[tuple[str, Numbers | None, Callable[[TargetLayer], int | None]]] = [
            ("blocks", self.blocks, lambda layer: layer.block),
            ("experts", self.experts, lambda layer: layer.expert_number),
        ]
        for name, chosen, number_of in limits:
            if chosen is None:
                continue
            numbered = [(number, layer) for layer in layers if (number := number_of(layer)) is not None]
            there = sorted({number for number, _ in numbered})
            if not chosen or not set(chosen) <= set(there):
                has = f"its {name} have the numbers {_ranges(there)}" if there else f"it has no numbered {name}"
                raise BadInput(f"target.{name}={list(chosen)} of {model.name}, target={self.name}: {has}")
            layers = [layer for number, layer in numbered if number in chosen]
        return layers


@dataclass(frozen=True)
class Placed:
    """Every matrix of a network with its role, and the other parameters of its blocks.

    Attributes:
        layers: the matrices, in forward order of their definition.
        others: other parameters of two or more dimensions in the blocks: name, role of the part to which they belong,
            number of entries, and kind.
        around: paths of the matrices that lie outside the blocks.
    """

    layers: list[TargetLayer]
    others: list[tuple[str, str | None, int, str]]
    around: frozenset[str]

    def without(self, roles: Collection[str], chosen: Sequence[TargetLayer]) -> list[LeftOut]:
        """Parameters of the blocks that are not chosen; names that differ only in numbers share an entry.

        Args:
            roles: the roles that the target includes.
            chosen: the layers that it includes.
        """
        included = {layer.path for layer in chosen}
        rest = [
            (layer.weight_name, layer.role, layer.parameters, LIMIT if layer.role in roles else "role")
            for layer in self.layers
            if layer.path not in included and layer.path not in self.around
        ]
        whole = sum(layer.parameters for layer in self.layers if layer.path not in self.around)
        whole += sum(parameters for _, _, parameters, _ in self.others)
        sizes: Counter[tuple[str, str | None, str]] = Counter()
        for path, role, parameters, reason in [*rest, *self.others]:
            sizes[_pattern(path), role, reason] += parameters
        return [
            LeftOut(path, role, count, count / whole, reason, inside=role in roles and reason != LIMIT)
            for (path, role, reason), count in sizes.items()
        ]


def linear_layers(model: Model, reading: str = "module") -> list[TargetLayer]:
    """Every matrix of the network with its role, in forward order of its definition; see :func:`placed`."""
    return placed(model, reading).layers


def placed(model: Model, reading: str = "module") -> Placed:
    """Place every parameter of two or more dimensions in the network's blocks, and every linear layer outside them.

    Raises:
        BadInput: parameters that nothing explains.
    """
    network, config, architecture = model.network, model.network.config, model.architecture
    depth = getattr(config, architecture.shared_depth) if architecture.shared_depth else 1
    hidden = getattr(model.text_config, "hidden_size", 0)
    roles = architecture.roles(network, reading)
    copies = _copies(network)
    again = set(chain.from_iterable(copies.values()))
    layers: list[TargetLayer] = []
    others: list[tuple[str, str | None, int, str]] = []
    unknown: list[str] = []
    for path, module in network.named_modules():
        if roles.is_outside(path) or path in again:
            continue
        matrix = is_linear(module) or (roles.block_of(path) and _is_matrix(module))
        if matrix and (role := roles.of(path)):
            uses = 1 if role in (TRANSFORM, FINAL) else depth
            block = _number(roles.block_of(path))
            layers.append(TargetLayer(path, role, network, uses, block=block, copies=copies.get(path, ())))
        elif matrix:
            unknown.append(path)
        if is_linear(module) or not roles.block_of(path):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or (matrix and name == "weight"):
                continue
            full = f"{path}.{name}"
            role = roles.of(path)
            if reason := roles.reason(path, name):
                others.append((full, role, parameter.numel(), reason))
            elif role and parameter.dim() == 3 and (transposed := _transposed(module, name, hidden)) is not None:
                experts = (Expert(path, name, number, transposed) for number in range(len(parameter)))
                block = _number(roles.block_of(path))
                layers += [TargetLayer(f"{full}.{e.number}", role, network, depth, e, block) for e in experts]
            else:
                unknown.append(full)
    if unknown:
        alike = {pattern: list(names) for pattern, names in groupby(sorted(unknown, key=_pattern), _pattern)}
        named = [names[0] if len(names) == 1 else pattern for pattern, names in alike.items()]
        raise BadInput(
            f"{model.name} ({config.model_type}) has parameters of unknown role: {', '.join(named)} "
            "(docs/extending.md shows how to give one a role)"
        )
    return Placed(layers, others, frozenset(layer.path for layer in layers if not roles.block_of(layer.holder)))


def _copies(network: nn.Module) -> dict[str, tuple[str, ...]]:
    """Of matrices that several modules share, the path of the first of these and the paths of the others."""
    paths: dict[object, list[str]] = defaultdict(list)
    for path, module in network.named_modules(remove_duplicate=False):
        if is_linear(module) or _is_matrix(module):
            paths[module._parameters.get("weight", module)].append(path)  # a module that replaced them has none
    return {first: tuple(others) for first, *others in paths.values() if others}


def _pattern(path: str) -> str:
    """A path with ``*`` in place of numbers."""
    return _NUMBER.sub("*", path)


def _number(block: str | None) -> int | None:
    """The number of a block in its stack, by its path."""
    return int(block.rpartition(".")[2]) if block else None


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as text, e.g. ``0-3, 5``."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module of another kind holds one matrix ``[out_features, in_features]``, as routers do."""
    weight = module._parameters.get("weight")
    return not isinstance(module, nn.Embedding) and weight is not None and weight.dim() == 2


def _transposed(module: nn.Module, name: str, hidden: int) -> bool | None:
    """Whether a bank of experts is ``[experts, in, out]``; None if this cannot be determined.

    Transformers declares it for the banks that it runs itself; otherwise the width of the hidden states shows it, which
    experts read first and output last.
    """
    known = getattr(module, "is_transposed", None)
    if known is not None:
        return bool(known)
    if name == "weight":  # one module per matrix, laid out as in nn.Linear
        return False
    _, rows, columns = module._parameters[name].shape  # type: ignore[union-attr]
    if (rows == hidden) == (columns == hidden):
        return None
    return (columns == hidden) if "down" in name else (rows == hidden)
