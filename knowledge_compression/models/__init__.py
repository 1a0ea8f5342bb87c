"""Models: their sources, their families, and the roles of their layers."""

from knowledge_compression.models.model import Model
from knowledge_compression.models.targets import Target, TargetLayer, Targets

__all__ = ["Model", "Target", "TargetLayer", "Targets"]
