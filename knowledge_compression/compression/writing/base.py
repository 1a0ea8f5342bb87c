"""The interface of a form in which a compressed model is saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from knowledge_compression.compression.base import Compression
from knowledge_compression.models import Model, Targets

if TYPE_CHECKING:
    from knowledge_compression.models.loading import ModelSource


class Writer(ABC):
    """A form in which a compressed model is saved.

    Attributes:
        streams: whether a model that is compressed from disk to disk can have this form.
    """

    streams: ClassVar[bool] = False

    @abstractmethod
    def refusal(self, compression: Compression, targets: Targets) -> str | None:
        """Why this form cannot hold what a compression makes of these layers; None if it can.

        This is asked before anything is computed, of a network that may be on the meta device.
        """

    def check(self, skeleton: Model, source: ModelSource) -> None:  # noqa: B027 (most forms hold every model)
        """Refuse a model that this form cannot hold, whatever is done to it.

        Args:
            skeleton: the model's network, which may be on the meta device.
            source: where the model comes from.

        Raises:
            BadInput: it cannot.
        """

    @abstractmethod
    def write(self, model: Model, folder: Path) -> Mapping[str, Any]:
        """Save a compressed model under a temporary name and rename it when complete.

        Args:
            model: the compressed model, unchanged since.
            folder: where to; replaced if it is there.

        Returns:
            What a reader of the run's report must know of the files, JSON-ready; empty if nothing.

        Raises:
            BadInput: the form cannot hold this model, or a weight is not finite; nothing is written.
        """


class Floats(Writer):
    """An ordinary checkpoint: every weight as the floating-point number that it is."""

    streams = True

    def refusal(self, compression: Compression, targets: Targets) -> str | None:
        """It holds everything."""
        return None

    def write(self, model: Model, folder: Path) -> Mapping[str, Any]:
        """Save network, configuration and tokenizer."""
        from knowledge_compression.models.saving import save_checkpoint

        save_checkpoint(model, folder)
        return {}
