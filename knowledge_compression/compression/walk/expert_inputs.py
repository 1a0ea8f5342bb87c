"""The inputs of each expert of a bank, which transformers keeps in one tensor that no module hook sees."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from knowledge_compression.models.targets import TargetLayer

# The functions by which networks of transformers multiply inputs by a weight.
_PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "mm", "bmm"})


class ExpertProducts(TorchFunctionMode):
    """While it is active, recognizes products with a part of a bank by that part's address in memory.

    Args:
        layers: the experts' layers to recognize.
    """

    def __init__(self, layers: Sequence[TargetLayer]) -> None:
        super().__init__()
        self._banks: dict[int, list[tuple[int, int, dict[int, str]]]] = defaultdict(list)
        paths: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
        for layer in layers:
            assert layer.expert is not None
            paths[layer.expert.bank, layer.expert.parameter][layer.expert.number] = layer.path
        for (bank, parameter), numbers in paths.items():
            tensor: Tensor = getattr(layers[0].network.get_submodule(bank), parameter)
            place = tensor.untyped_storage().data_ptr()
            self._banks[place].append((int(tensor.storage_offset()), tensor.stride(0), numbers))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and record its inputs if it multiplied by an expert."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if getattr(func, "__name__", "") not in _PRODUCTS:
            return output
        values, weight = (*args, *kwargs.values())[:2]
        numbers = self._numbers(weight)
        if numbers is None:
            return output
        first, paths = numbers
        if weight.dim() == 2 and first in paths and values.numel():
            return self.saw(paths[first], values.reshape(-1, values.shape[-1]), output)
        if weight.dim() == 3:  # the whole bank at once; tokens that were not sent to an expert arrive as zeros
            given = list(output)
            for number, path in paths.items():
                sent = values[number].ne(0).any(dim=-1)
                if sent.any():
                    told = self.saw(path, values[number][sent], given[number][sent])
                    given[number] = given[number].masked_scatter(sent[:, None], told)
            return torch.stack(given)
        return output

    @abstractmethod
    def saw(self, path: str, values: Tensor, output: Tensor) -> Tensor:
        """Called for each product.

        Args:
            path: of the expert's layer.
            values: its inputs, ``[tokens, in_features]``, at least one token.
            output: the product with them.

        Returns:
            The tensor that the network gets in place of the output.
        """

    def _numbers(self, weight: object) -> tuple[int, dict[int, str]] | None:
        """The index of the tensor's first expert and the paths of its bank's layers; None if it belongs to no bank."""
        if not isinstance(weight, Tensor) or weight.is_meta:
            return None
        for start, stride, paths in self._banks.get(weight.untyped_storage().data_ptr(), ()):
            number = (weight.storage_offset() - start) // stride
            if 0 <= number <= max(paths):
                return number, paths
        return None


class ExpertInputs(ExpertProducts):
    """Records the inputs of each expert.

    Args:
        layers: the experts' layers.
        on_output: called with the path and output of each product; returns the tensor that the network gets in place of
            the output.

    Attributes:
        inputs: the inputs of each expert layer, ``[tokens, in_features]``, by path, in the order in which they ran; an
            expert that got no token is absent.
    """

    def __init__(self, layers: Sequence[TargetLayer], on_output: Callable[[str, Tensor], Tensor] | None = None) -> None:
        super().__init__(layers)
        self.inputs: dict[str, Tensor] = {}
        self._on_output = on_output

    def saw(self, path: str, values: Tensor, output: Tensor) -> Tensor:
        """Append the values to those seen before."""
        before = self.inputs.get(path)
        self.inputs[path] = values.detach() if before is None else torch.cat([before, values.detach()])
        return output if self._on_output is None else self._on_output(path, output)


@contextmanager
def one_expert_after_the_other(network: nn.Module) -> Iterator[None]:
    """Multiply by the experts of a bank one at a time rather than by a kernel that takes all of them at once."""
    configs = {
        id(config): config
        for module in network.modules()
        if (config := getattr(module, "config", None)) is not None and hasattr(module, "is_transposed")
    }
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
