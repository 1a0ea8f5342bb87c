"""Models: where they come from, which family they are of, and which of their layers are which."""

from knowledge_compression.models.model import Model
from knowledge_compression.models.targets import Target, TargetLayer, Targets

__all__ = ["Model", "Target", "TargetLayer", "Targets"]
