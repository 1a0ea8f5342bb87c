"""Hydra takes sweepers and launchers only from this namespace; ours live in the package."""

from knowledge_compression.sweep import PlannedSweeper


class Planned(PlannedSweeper):
    """The sweeper under the name that Hydra accepts."""
