"""The matrices of a network that a compression changes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from knowledge_compression.errors import BadInput
from knowledge_compression.heavy import nn, torch
from knowledge_compression.identity import LABEL
from knowledge_compression.models.families import FINAL, ROLES, TRANSFORM
from knowledge_compression.models.model import Model

if TYPE_CHECKING:
    from knowledge_compression.models.replaced import ReplacedLinear

READINGS = ("module", "paper")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, eq=False)
class TargetLayer:
    """One matrix of the network that can be compressed: a linear layer, or one expert's part of a bank of experts.

    Attributes:
        path: module path, e.g. ``model.layers.0.self_attn.q_proj``; for an expert, the path of the bank and the
            expert's number, e.g. ``model.layers.0.mlp.experts.down_proj.7``.
        role: one of :data:`~knowledge_compression.models.families.ROLES`.
        uses: how often a forward pass uses it (ALBERT shares one block over its whole depth).
        expert: its place in a bank of experts, if it belongs to one.
    """

    path: str
    role: str
    network: nn.Module
    uses: int = 1
    expert: Expert | None = None

    @property
    def holder(self) -> str:
        """Path of the module that gets this layer's inputs: its own, or that of the bank of experts."""
        return self.expert.bank if self.expert else self.path

    @property
    def module(self) -> nn.Module:
        """The module that is currently at :attr:`holder`."""
        return self.network.get_submodule(self.holder)

    @property
    def weight_name(self) -> str:
        """Name of the network's parameter that holds the weight."""
        return f"{self.expert.bank}.{self.expert.parameter}" if self.expert else f"{self.path}.weight"

    @property
    def weight(self) -> torch.Tensor:
        """The weight ``[out_features, in_features]`` as a view to be modified in place, also for GPT-2's Conv1D."""
        from transformers.pytorch_utils import Conv1D

        from knowledge_compression.models.replaced import ReplacedExperts

        module = self.module
        if self.expert:
            bank = getattr(module, self.expert.parameter)
            if isinstance(bank, ReplacedExperts):  # others of the bank have been replaced
                return bank.get_submodule(str(self.expert.number)).weight.detach()  # type: ignore[operator]
            return bank.data[self.expert.number].T if self.expert.transposed else bank.data[self.expert.number]
        weight: torch.Tensor = module.weight.data  # type: ignore[assignment]
        return weight.T if isinstance(module, Conv1D) else weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias ``[out_features]``, if the layer has its own."""
        bias = self.bias_parameter
        return bias.data if bias is not None else None

    @property
    def bias_parameter(self) -> nn.Parameter | None:
        """The same as the module holds it. The biases of a bank of experts are the bank's, and are added by it."""
        return None if self.expert else getattr(self.module, "bias", None)

    @property
    def notes(self) -> dict[str, Any]:
        """Data that a method stores with the layer besides its weight; not part of the network's state."""
        if self.expert is None:
            return self.module.__dict__
        kept: dict[str, dict[str, Any]] = self.module.__dict__.setdefault("notes_of_experts", {})
        return kept.setdefault(self.path, {})

    @property
    def parameters(self) -> int:
        """Number of weights (biases are not compressed and not counted)."""
        return self.weight.numel()

    @property
    def is_replaceable(self) -> bool:
        """Whether another module can replace it: not if the network uses its weight in another way."""
        return self.expert is not None or is_linear(self.module)

    @property
    def is_replaced(self) -> bool:
        """Whether a compression has put a module of its own in its place."""
        from knowledge_compression.models.replaced import ReplacedLinear

        return isinstance(self.module, ReplacedLinear)

    def replace(self, module: ReplacedLinear) -> None:
        """Replace this layer by another module."""
        if self.expert:
            from knowledge_compression.models.replaced import ReplacedExperts

            ReplacedExperts.in_place_of(self.module, self.expert.parameter, self.expert.transposed)
        self.network.set_submodule(self.path, module)


@dataclass(frozen=True)
class Expert:
    """The place of one expert's matrix: in a parameter ``[experts, out, in]``, or transposed, ``[experts, in, out]``.

    Attributes:
        bank: path of the module that holds all experts.
        parameter: name of its parameter.
        number: index of the expert.
        transposed: whether the parameter is ``[experts, in_features, out_features]``.
    """

    bank: str
    parameter: str
    number: int
    transposed: bool


@dataclass(frozen=True)
class LeftOut:
    """Parameters of the blocks, of two or more dimensions, that a target does not include.

    Attributes:
        path: their name, with ``*`` in place of numbers.
        role: role of the part to which they belong, or None.
        parameters: number of entries.
        share: their share of all such parameters of the network's blocks.
        reason: ``role`` if the target does not include their role, otherwise their kind, e.g. ``convolution``.
        inside: whether the target includes the role of the part to which they belong.
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

    @cached_property
    def parameters_in_use(self) -> int:
        """Number of weights in the selection, counted once per use (as the first paper's Table 2 counts ALBERT)."""
        return sum(layer.parameters * layer.uses for layer in self._layers)

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
        name: what the user types.
        roles: the roles that it includes under ``reading=module``.
        paper_roles: the roles that it includes under ``reading=paper``; by default the same.
        final_when_quantized: whether quantization of this target includes the final layer, as published; pruning
            excludes it.
        reading: ``module`` (a linear belongs to the module that contains it) or ``paper`` (as counted in Table 2 of
            paper 1).
    """

    name: str = field(metadata=LABEL)
    roles: Sequence[str]
    paper_roles: Sequence[str] | None = None
    final_when_quantized: bool = False
    reading: str = "module"

    def __post_init__(self) -> None:
        """Refuse unknown roles and readings."""
        if self.reading not in READINGS:
            raise BadInput(f"reading='{self.reading}' does not exist; choose one of {', '.join(READINGS)}")
        unknown = set(self.roles) | set(self.paper_roles or ())
        if unknown := unknown - set(ROLES):
            raise BadInput(
                f"target={self.name}: no role is called {', '.join(sorted(unknown))}; roles: {', '.join(ROLES)}"
            )

    def select(self, model: Model) -> Targets:
        """The layers of ``model`` that have one of the roles.

        Raises:
            BadInput: the model has none, or has linear layers that cannot be placed.
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
        return Targets(
            chosen,
            model,
            self.reading,
            takes_final_when_quantized=self.final_when_quantized,
            left_out=everything.without(roles),
        )


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

    def without(self, roles: Collection[str]) -> list[LeftOut]:
        """Parameters of the blocks not in these roles; names that differ only in numbers share an entry."""
        rest = [
            (layer.weight_name, layer.role, layer.parameters, "role")
            for layer in self.layers
            if layer.role not in roles and layer.path not in self.around
        ]
        whole = sum(layer.parameters for layer in self.layers if layer.path not in self.around)
        whole += sum(parameters for _, _, parameters, _ in self.others)
        sizes: Counter[tuple[str, str | None, str]] = Counter()
        for path, role, parameters, reason in [*rest, *self.others]:
            sizes[_pattern(path), role, reason] += parameters
        return [
            LeftOut(path, role, count, count / whole, reason, inside=role in roles)
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
    layers: list[TargetLayer] = []
    others: list[tuple[str, str | None, int, str]] = []
    unknown: list[str] = []
    for path, module in network.named_modules():
        if roles.is_outside(path):
            continue
        matrix = is_linear(module) or (roles.block_of(path) and _is_matrix(module))
        if matrix and (role := roles.of(path)):
            layers.append(TargetLayer(path, role, network, uses=1 if role in (TRANSFORM, FINAL) else depth))
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
                layers += [TargetLayer(f"{full}.{e.number}", role, network, depth, e) for e in experts]
            else:
                unknown.append(full)
    if unknown:
        alike = {pattern: list(names) for pattern, names in groupby(sorted(unknown, key=_pattern), _pattern)}
        named = [names[0] if len(names) == 1 else pattern for pattern, names in alike.items()]
        raise BadInput(
            f"{model.name} ({config.model_type}) has parameters of unknown role: {', '.join(named)} "
            "(docs/extending.md says how to name one)"
        )
    return Placed(layers, others, frozenset(layer.path for layer in layers if not roles.block_of(layer.holder)))


def _pattern(path: str) -> str:
    """A path with ``*`` in place of numbers."""
    return _NUMBER.sub("*", path)


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by a stored weight matrix: nn.Linear, Conv1D, or ours that replace them."""
    from transformers.pytorch_utils import Conv1D

    from knowledge_compression.models.replaced import ReplacedLinear

    return isinstance(module, (nn.Linear, Conv1D, ReplacedLinear))


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
