"""The modules by which a compression replaces a linear layer, or one expert's matrix in a bank of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from knowledge_compression.errors import BadInput


class ReplacedLinear(nn.Module):
    """The base class of modules that replace a linear layer and are treated as one everywhere.

    Attributes:
        in_features, out_features: as in ``nn.Linear``.
        bias: ``[out_features]`` or None.
        bits: bits of one stored weight.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    bits: float

    @property
    def weight(self) -> Tensor:
        """The weight that is stored, ``[out_features, in_features]``; a copy, not to be modified."""
        raise NotImplementedError

    @property
    def overhead_bits(self) -> int:
        """Bits for scales and zero points of the whole layer."""
        raise NotImplementedError

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of this layer besides its buffers and its bias, JSON-ready."""
        raise NotImplementedError

    @classmethod
    def from_buffers(cls, buffers: Mapping[str, Tensor], bias: Any, **settings: Any) -> Self:
        """Rebuild a layer from its buffers, its bias and its :attr:`settings`."""
        raise NotImplementedError


class ReplacedExperts(nn.ModuleList):
    """A bank of experts as one module per expert, for networks that keep the bank in one parameter.

    The network still multiplies by parts of this object as if it were the parameter; each such product calls the
    expert's module. A module's path consists of the parameter's path and the expert's number.

    Args:
        experts: ``nn.Linear`` or :class:`ReplacedLinear` without a bias, in the order of the bank.
        transposed: whether the network expects the bank as ``[experts, in_features, out_features]``.
    """

    def __init__(self, experts: Sequence[nn.Module], transposed: bool) -> None:
        super().__init__(experts)
        self.transposed = transposed

    @classmethod
    def in_place_of(cls, bank: nn.Module, parameter: str, transposed: bool) -> ReplacedExperts:
        """Split a module's parameter into linear layers that share its memory; repeated calls return the same bank.

        Kernels that multiply by all experts at once cannot be used with it, so the module no longer uses them.
        """
        there = getattr(bank, parameter)
        if isinstance(there, cls):
            return there
        made = cls([_linear(weight.T if transposed else weight) for weight in there.data], transposed)
        delattr(bank, parameter)
        bank.add_module(parameter, made)
        config: Any = getattr(bank, "config", None)
        if config is not None:
            own = copy(config)  # the network's own configuration must not change
            own._experts_implementation = "eager"
            bank.config = own
        return made

    @property
    def weight(self) -> Tensor:
        """The parameter that the modules represent, in the layout that the network expects; a copy."""
        weights = torch.stack([expert.weight.detach() for expert in self])  # type: ignore[operator]
        return weights.transpose(1, 2).contiguous() if self.transposed else weights

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter that it replaces."""
        first: Any = self._modules["0"]
        sizes = (first.in_features, first.out_features) if self.transposed else (first.out_features, first.in_features)
        return torch.Size((len(self), *sizes))

    def __getitem__(self, number: Any) -> Any:
        """The replacement of one expert's matrix in a product."""
        return _Factor([self._modules[str(int(number))]], self.transposed, whole=False)

    def transpose(self, *_: int) -> _Factor:
        """The replacement of the bank, with the last two dimensions swapped."""
        return _Factor(list(self._modules.values()), not self.transposed, whole=True)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A product with the whole bank."""
        left, bank = (*args, *(kwargs or {}).values())[:2]
        return _Factor(list(bank._modules.values()), bank.transposed, whole=True).multiply(func, left)


class _Factor:
    """Stands for a weight on the right of a product: one expert's ``[out, in]`` (``[in, out]``), or a whole bank."""

    def __init__(self, experts: Sequence[Any], transposed: bool, whole: bool) -> None:
        self.experts, self.transposed, self.whole = experts, transposed, whole

    def float(self) -> Self:
        """Itself, because the module decides in which type it multiplies."""
        return self

    def multiply(self, func: Any, left: Tensor) -> Tensor:
        """The product of ``left`` with it, by the experts' modules."""
        name = getattr(func, "__name__", str(func))
        if self.whole and name in ("bmm", "matmul", "__matmul__") and self.transposed:
            return torch.stack([expert(part) for expert, part in zip(self.experts, left, strict=True)])
        if not self.whole and (name == "linear" if not self.transposed else name in ("matmul", "__matmul__", "mm")):
            return self.experts[0](left)
        raise BadInput(
            f"this network multiplies by its experts in a way ({name}) that replaced modules do not support; choose a "
            "method that changes only weights, e.g. compression=rtn compression.bits=8"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A product with it."""
        left, factor = (*args, *(kwargs or {}).values())[:2]
        return factor.multiply(func, left)


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
