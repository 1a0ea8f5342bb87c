"""A compressed checkpoint on disk, and the network that its weights represent.

The weights are passed to transformers' own loader as values that are read and decoded on demand, one at a time, so that
its names, ties and conversions apply to compressed files too, and memory holds the decoded network and one layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knowledge_compression.models.checkpoints.base import StoredAs
from knowledge_compression.progress import counted

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_one_at_a_time = Lock()


class Later:
    """A weight that is decoded when the loader requests all of it, like a slice of a safetensors file."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make

    def __getitem__(self, everything: Any) -> Tensor:
        """The whole weight; a lock makes the loader's threads decode one at a time."""
        with _one_at_a_time:
            return self._make()

    def then(self, tell: Callable[[], None]) -> Later:
        """The same weight, which reports when it has been decoded."""

        def make() -> Tensor:
            weight = self._make()
            tell()
            return weight

        return Later(make)


class Stored(ABC):
    """A compressed checkpoint on disk: its record, and everything needed for loading.

    Attributes:
        files: all files that decide the model's answers.
    """

    files: Iterable[Path]

    @abstractmethod
    def configuration(self, **hub: Any) -> PretrainedConfig:
        """The network's configuration, as if it had never been compressed."""

    @abstractmethod
    def tokenizer(self, **hub: Any) -> PreTrainedTokenizerBase:
        """The tokenizer."""

    @abstractmethod
    def weights(self, skeleton: PreTrainedModel) -> Mapping[str, Later]:
        """Every weight by its name for transformers' loader.

        Args:
            skeleton: the network on the meta device.

        Raises:
            BadInput: the stored tensors contradict the network or one another.
        """

    @abstractmethod
    def record(self) -> StoredAs:
        """The record of the file.

        Raises:
            BadInput: the stored tensors contradict one another.
        """

    def network(self, kind: Any, config: PretrainedConfig, dtype: torch.dtype | str) -> tuple[Any, Mapping[str, Any]]:
        """The decoded network, and transformers' report on loading it.

        Args:
            kind: the auto class of such networks.
            config: the result of :meth:`configuration`.
            dtype: of its weights; ``auto`` is the configuration's own.
        """
        with torch.device("meta"):
            skeleton = kind.from_config(config)
        if dtype == "auto":
            dtype = config.dtype or torch.float16
        weights = self.weights(skeleton)
        with counted(len(weights), "decoding weights") as advance:
            network, said = type(skeleton).from_pretrained(
                None,
                config=config,
                state_dict={name: weight.then(lambda: advance(1)) for name, weight in weights.items()},
                dtype=dtype,
                ignore_mismatched_sizes=True,  # which are in the report
                output_loading_info=True,
            )
        return network, said
