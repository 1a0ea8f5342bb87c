"""The recovery corpus of the controlled world: what is true of entities that no probe asks about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import LongTensor

from knowledge_compression.corpora.corpus import Windowed
from knowledge_compression.corpora.text import TextFile
from knowledge_compression.errors import BadInput
from knowledge_compression.models import Model


@dataclass(frozen=True)
class WorldText(Windowed):
    """The recovery corpus of the world that the model was trained on; it names no subject that a probe asks about."""

    name: str = "world"
    length: int = 32

    def fingerprint(self) -> str:
        """Nothing of its own: the model's fingerprint names the world, and with it the text."""
        return "of the model's world"

    def prepared(self, model: Model) -> TextFile:
        """The text of the model's own world.

        Raises:
            BadInput: the model was not trained on a controlled world.
        """
        folder = model.provenance.get("world")
        if folder is None:
            raise BadInput(
                f"corpus=world is the text of a controlled world, and {model.name} was not trained on one; "
                "take model=world_encoder, world_encoder_decoder or world_decoder, or another corpus"
            )
        return TextFile(self.name, self.samples, self.length, self.seed, path=str(Path(folder) / "recovery.txt"))

    def windows(self, model: Model) -> LongTensor:
        """Calibration windows ``[samples, length]``."""
        return self.prepared(model).windows(model)

    def token_stream(self, model: Model) -> LongTensor:
        """All of it as one row of token ids."""
        return self.prepared(model).token_stream(model)
