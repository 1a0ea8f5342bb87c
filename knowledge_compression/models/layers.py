"""One matrix of a network: its place, its role, and a writable view of its weight."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from knowledge_compression.heavy import nn, torch
from knowledge_compression.models.families import EXPERTS

if TYPE_CHECKING:
    from knowledge_compression.models.replaced import ReplacedLinear

_EXPERT = re.compile(r"experts\.(?:expert_)?(\d+)\.")  # one module per expert, in a list or (Switch) in a dictionary


@dataclass(frozen=True, eq=False)
class TargetLayer:
    """One matrix of the network that can be compressed: a linear layer, or one expert's part of a bank of experts.

    Attributes:
        path: module path, e.g. ``model.layers.0.self_attn.q_proj``; for an expert, the path of the bank and the
            expert's number, e.g. ``model.layers.0.mlp.experts.down_proj.7``.
        role: one of :data:`~knowledge_compression.models.families.ROLES`.
        uses: how often a forward pass uses it (ALBERT shares one block over its whole depth).
        expert: its place in a bank of experts, if it belongs to one.
        block: number of its block in its stack, from 0; None outside the blocks.
        copies: paths of further modules that multiply by the same parameter (Zamba's blocks share their attention).
    """

    path: str
    role: str
    network: nn.Module
    uses: int = 1
    expert: Expert | None = None
    block: int | None = None
    copies: tuple[str, ...] = ()

    @property
    def expert_number(self) -> int | None:
        """Number of the routed expert to which it belongs, from 0; None for any other layer."""
        if self.expert:
            return self.expert.number
        number = _EXPERT.search(self.path) if self.role == EXPERTS else None
        return int(number[1]) if number else None

    @property
    def holder(self) -> str:
        """Path of the module that gets this layer's inputs: its own, or that of the bank of experts."""
        return self.expert.bank if self.expert else self.path

    @property
    def module(self) -> nn.Module:
        """The module that is currently at :attr:`holder`."""
        # get_submodule also checks each step, which takes longer.
        module: nn.Module = attrgetter(self.holder)(self.network)
        return module

    @property
    def weight_name(self) -> str:
        """Name of the network's parameter that holds the weight."""
        return f"{self.expert.bank}.{self.expert.parameter}" if self.expert else f"{self.path}.weight"

    @property
    def weight(self) -> torch.Tensor:
        """The weight ``[out_features, in_features]`` as a view to be modified in place, also for GPT-2's Conv1D."""
        from knowledge_compression.models.replaced import ReplacedExperts

        module = self.module
        held = self._held(module)
        if self.expert and isinstance(held, ReplacedExperts):  # other experts of the bank have been replaced
            return held.get_submodule(str(self.expert.number)).weight.detach()  # type: ignore[operator]
        return self._part_of(held.data, module)

    @property
    def parameter(self) -> nn.Parameter:
        """The network's parameter that holds the weight; the experts of a bank share one."""
        held: nn.Parameter = self._held(self.module)
        return held

    def _held(self, module: nn.Module) -> Any:
        return getattr(module, self.expert.parameter) if self.expert else module.weight

    def part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This layer's ``[out_features, in_features]`` of a tensor of :attr:`parameter`'s shape, e.g. its gradient."""
        return self._part_of(tensor, self.module)

    def _part_of(self, tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
        from transformers.pytorch_utils import Conv1D

        if self.expert:
            return tensor[self.expert.number].T if self.expert.transposed else tensor[self.expert.number]
        return tensor.T if isinstance(module, Conv1D) else tensor

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias ``[out_features]``, if the layer has its own."""
        bias = self.bias_parameter
        return bias.data if bias is not None else None

    @property
    def bias_parameter(self) -> nn.Parameter | None:
        """The bias if the module itself holds it; the biases of a bank of experts are held and added by the bank."""
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
        """Whether another module can replace it, which is false if the network uses its weight in another way."""
        return self.expert is not None or (is_linear(self.module) and _answers_as_linear(self.module))

    @property
    def is_replaced(self) -> bool:
        """Whether a compression has replaced it by a module of its own."""
        return self.replacement is not None

    @property
    def replacement(self) -> ReplacedLinear | None:
        """The module by which a compression has replaced it, if any."""
        from knowledge_compression.models.replaced import ReplacedExperts, ReplacedLinear

        module: Any = self.module
        if self.expert and isinstance(bank := getattr(module, self.expert.parameter), ReplacedExperts):
            module = bank.get_submodule(str(self.expert.number))
        return module if isinstance(module, ReplacedLinear) else None

    def moved(self, network: nn.Module, path: str) -> TargetLayer:
        """The same layer in another network, at another path; only the number of its block may differ."""
        expert, block = self.expert, self.block
        if expert is not None:
            bank = path[: len(path) - len(self.path) + len(expert.bank)]
            expert = replace(expert, bank=bank)
        if path != self.path and block is not None:
            block = next(int(now) for was, now in zip(self.path.split("."), path.split("."), strict=True) if was != now)
        return replace(self, path=path, network=network, expert=expert, block=block)

    def replace(self, module: ReplacedLinear) -> None:
        """Replace this layer by another module."""
        if self.expert:
            from knowledge_compression.models.replaced import ReplacedExperts

            ReplacedExperts.in_place_of(self.module, self.expert.parameter, self.expert.transposed)
        for path in (self.path, *self.copies):
            self.network.set_submodule(path, module)


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


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by a stored weight matrix: nn.Linear, Conv1D, or a replacement."""
    from transformers.pytorch_utils import Conv1D

    from knowledge_compression.models.replaced import ReplacedLinear

    return isinstance(module, (nn.Linear, Conv1D, ReplacedLinear))


def _answers_as_linear(module: Any) -> bool:
    """Whether a linear layer's output is one product with the whole of its weight.

    Llama 4's routers also choose experts, and the grouped projection of DeepSeek V4 gives each of its outputs a part of
    the input. Layers with a ``forward`` of their own are tried, without values.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    weights = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
    inputs = torch.empty(1, 2, module.in_features, device="meta", dtype=module.weight.dtype)
    try:
        output = torch.func.functional_call(module, weights, inputs)
    except (RuntimeError, ValueError):  # it reads inputs of another shape
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, 2, module.out_features)
