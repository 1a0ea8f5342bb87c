"""Saving as GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_compression.compression.base import Compression
from knowledge_compression.compression.solve.mixtures import MIXTURES
from knowledge_compression.compression.writing.base import Writer
from knowledge_compression.models import Model, Targets

if TYPE_CHECKING:
    from knowledge_compression.models.source import ModelSource

TYPES = (
    *("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    *MIXTURES,
)


class GgufWriter(Writer):
    """A GGUF file. A layer whose compression put it on a grid that a type has is stored exactly, in that type.

    Args:
        kind: one of :data:`TYPES`, in which everything else is stored; None takes the narrowest floats that hold it
            exactly.
    """

    def __init__(self, kind: str | None = None) -> None:
        self.kind = kind

    def refusal(self, compression: Compression, targets: Targets) -> str | None:
        """It holds the weights of every compression."""
        return None

    def check(self, skeleton: Model, source: ModelSource) -> None:
        """Refuse an architecture, a setting or a tokenizer that such a file cannot describe."""
        from knowledge_compression.compression.formats.gguf import GgufModel

        GgufModel.of(replace(skeleton, tokenizer=source.tokenizer()))

    def write(self, model: Model, folder: Path) -> Mapping[str, Any]:
        """Write the file into the folder."""
        from gguf import GGMLQuantizationType

        from knowledge_compression.compression.formats.gguf import save_gguf

        if self.kind is None or self.kind in MIXTURES:
            return save_gguf(model, folder, self.kind)
        return save_gguf(model, folder, GGMLQuantizationType[self.kind.upper()])
