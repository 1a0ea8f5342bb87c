"""The interface of a format in which a compressed model is saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from knowledge_compression.compression.base import Compression
from knowledge_compression.models import Model, Targets

if TYPE_CHECKING:
    from knowledge_compression.models.source import ModelSource


class Writer(ABC):
    """A format in which a compressed model is saved.

    Attributes:
        streams: whether a model that is compressed from disk to disk can be saved in it.
    """

    streams: ClassVar[bool] = False

    @abstractmethod
    def refusal(self, compression: Compression, targets: Targets) -> str | None:
        """Why this format cannot hold these layers once a compression has changed them; None if it can.

        Called before anything is computed, with a network that may be on the meta device.
        """

    def check(self, skeleton: Model, source: ModelSource) -> None:  # noqa: B027 (most formats hold every model)
        """Refuse a model that this format cannot hold under any compression.

        Args:
            skeleton: the model's network, which may be on the meta device.
            source: the source of the model.

        Raises:
            BadInput: it cannot.
        """

    @abstractmethod
    def write(self, model: Model, folder: Path) -> Mapping[str, Any]:
        """Save a compressed model under a temporary name and rename it when complete.

        Args:
            model: the compressed model, unchanged since.
            folder: the folder to write; replaced if it exists.

        Returns:
            What a reader of the run's report must know about the files, JSON-ready; empty if there is nothing.

        Raises:
            BadInput: the format cannot hold this model, or a weight is not finite; nothing is written.
        """


class Floats(Writer):
    """An ordinary checkpoint: every weight as a floating-point number."""

    streams = True

    def refusal(self, compression: Compression, targets: Targets) -> str | None:
        """It holds everything."""
        return None

    def write(self, model: Model, folder: Path) -> Mapping[str, Any]:
        """Save network, configuration and tokenizer."""
        from knowledge_compression.models.saving import save_checkpoint

        save_checkpoint(model, folder)
        return {}
