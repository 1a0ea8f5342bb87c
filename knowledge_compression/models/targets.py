"""Which linear layers a compression touches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from knowledge_compression.errors import BadInput
from knowledge_compression.identity import LABEL
from knowledge_compression.models.families import FINAL, ROLES, TRANSFORM, architecture_of
from knowledge_compression.models.model import Model

READINGS = ("module", "paper")


class ReplacedLinear(nn.Module):
    """What a compression puts in the place of a linear layer, and what is taken for one everywhere.

    Attributes:
        in_features, out_features: as ``nn.Linear`` has them.
        bias: ``[out_features]`` or None.
        bits: of one stored weight.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    bits: float

    @property
    def weight(self) -> torch.Tensor:
        """The weight that the stored numbers stand for, ``[out_features, in_features]``; a copy, not to be written."""
        raise NotImplementedError

    @property
    def overhead_bits(self) -> int:
        """Bits for scales and the like, over the whole layer."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """What makes this layer beside its buffers and its bias, JSON-ready."""
        raise NotImplementedError

    @classmethod
    def from_buffers(cls, buffers: Mapping[str, torch.Tensor], bias: Any, **settings: Any) -> Self:
        """The layer that had these buffers, this bias and these :attr:`settings`."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TargetLayer:
    """One linear layer of the network that may be compressed.

    Attributes:
        path: module path, e.g. ``model.layers.0.self_attn.q_proj``.
        role: one of :data:`~knowledge_compression.models.families.ROLES`.
        uses: how often a forward pass runs through it (ALBERT shares one block over its whole depth).
    """

    path: str
    role: str
    network: nn.Module
    uses: int = 1

    @property
    def module(self) -> nn.Module:
        """The layer as it stands in the network now."""
        return self.network.get_submodule(self.path)

    @property
    def weight(self) -> torch.Tensor:
        """The weight ``[out_features, in_features]`` as a view that can be written in place, for GPT-2's Conv1D too."""
        weight: torch.Tensor = self.module.weight.data  # type: ignore[assignment]
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias ``[out_features]``, if the layer has one."""
        bias: nn.Parameter | None = self.module.bias  # type: ignore[assignment]
        return bias.data if bias is not None else None

    @property
    def parameters(self) -> int:
        """Number of weights (biases are not compressed and not counted)."""
        return self.weight.numel()

    def replace(self, module: ReplacedLinear) -> None:
        """Put another module in this layer's place."""
        self.network.set_submodule(self.path, module)


class Targets(Sequence[TargetLayer]):
    """An ordered selection of linear layers, in the order of the network's own modules."""

    def __init__(
        self,
        layers: Sequence[TargetLayer],
        model: Model,
        reading: str = "module",
        *,
        takes_final_when_quantized: bool = False,
    ) -> None:
        self._layers = list(layers)
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
        """Weights in the selection, each counted once."""
        return sum(layer.parameters for layer in self._layers)

    @cached_property
    def parameters_in_use(self) -> int:
        """Weights in the selection, a shared one counted once a use (as Table 2 of the first paper counts ALBERT)."""
        return sum(layer.parameters * layer.uses for layer in self._layers)

    def with_final(self) -> Targets:
        """The same selection and the final layer, as published quantization of everything has it."""
        if any(layer.role == FINAL for layer in self._layers):
            return self
        final = [layer for layer in linear_layers(self._model, self._reading) if layer.role == FINAL]
        return Targets([*self._layers, *final], self._model, self._reading)


@dataclass(frozen=True)
class Target:
    """A named choice of roles; one file under ``conf/target/`` each.

    Attributes:
        name: what the user types.
        roles: the roles it takes under ``reading=module``.
        paper_roles: the roles it takes under ``reading=paper``; the same where not given.
        final_when_quantized: whether quantization of this target takes in the final layer too, as published; pruning
            leaves it out.
        reading: ``module`` (a linear belongs where its module lies) or ``paper`` (as Table 2 of paper 1 counts).
    """

    name: str = field(metadata=LABEL)
    roles: Sequence[str]
    paper_roles: Sequence[str] | None = None
    final_when_quantized: bool = False
    reading: str = "module"

    def __post_init__(self) -> None:
        """Refuse roles and readings that do not exist."""
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
            BadInput: the model has none, or holds linears that the family map cannot place.
        """
        roles = self.paper_roles if self.reading == "paper" and self.paper_roles else self.roles
        layers = linear_layers(model, self.reading)
        chosen = [layer for layer in layers if layer.role in roles]
        if not chosen:
            there = [role for role in ROLES if any(layer.role == role for layer in layers)]
            raise BadInput(
                f"target={self.name} takes {', '.join(roles)}, which {model.name} ({model.network.config.model_type}) "
                f"does not have; it has {', '.join(there)}"
            )
        return Targets(chosen, model, self.reading, takes_final_when_quantized=self.final_when_quantized)


def linear_layers(model: Model, reading: str = "module") -> list[TargetLayer]:
    """Every linear layer of the network with its role, in forward order of its definition.

    Raises:
        BadInput: a linear layer that the family map does not know.
    """
    network, config = model.network, model.network.config
    architecture = architecture_of(config)
    depth = getattr(config, architecture.shared_depth) if architecture.shared_depth else 1
    layers, unknown = [], []
    for path, module in network.named_modules():
        if not is_linear(module):
            continue
        role = architecture.role_of(path, reading=reading)
        if role is None:
            unknown.append(path)
            continue
        layers.append(TargetLayer(path, role, network, uses=1 if role in (TRANSFORM, FINAL) else depth))
    if unknown:
        raise BadInput(f"{model.name} ({config.model_type}) has linear layers of unknown role: {', '.join(unknown)}")
    return layers


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by a stored weight matrix: nn.Linear, Conv1D, or ours that replace them."""
    return isinstance(module, (nn.Linear, Conv1D, ReplacedLinear))
