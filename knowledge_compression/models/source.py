"""What every source of models offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from knowledge_compression.models.model import Model
from knowledge_compression.models.spread import Spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from knowledge_compression.models.streamed import StreamedModel


class ModelSource(Protocol):
    """A source of a model."""

    name: str

    def load(self, device: str | Spread = "auto", dtype: str = "auto") -> Model:
        """Load the model in evaluation mode.

        Args:
            device: ``auto`` (a GPU if there is one), or a torch device.
            dtype: ``auto`` (float32 on a CPU, the checkpoint's own on a GPU), ``float32``, ``bfloat16`` or ``float16``.

        Raises:
            ModelUnavailable: it is not available.
            BadInput: it is available but cannot be used.
        """
        ...

    def skeleton(self) -> Model:
        """The network on the meta device, from its configuration: its layers and shapes without weights.

        Raises:
            ModelUnavailable: its configuration is not available.
        """
        ...

    def fingerprint(self) -> str:
        """A digest that identifies these weights."""
        ...

    def provenance(self) -> dict[str, Any]:
        """The origin of the weights, for the record."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone."""
        ...


class StreamableSource(ModelSource, Protocol):
    """A source whose model can be compressed without loading all of it.

    Attributes:
        stream: whether the user chose this.
    """

    stream: bool

    def streamed(self, device: str | Spread = "auto", dtype: str = "auto") -> StreamedModel:
        """A skeleton and the place of its weights; ``dtype=auto`` is the checkpoint's own on every device."""
        ...
