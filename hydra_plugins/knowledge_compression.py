"""Hydra takes sweepers and launchers only from this namespace; ours live in the package."""

from knowledge_compression.sweeping.local import LocalLauncher
from knowledge_compression.sweeping.slurm import SlurmLauncher
from knowledge_compression.sweeping.sweeper import PlannedSweeper


class Planned(PlannedSweeper):
    """The sweeper under the name that Hydra accepts."""


class Local(LocalLauncher):
    """The launcher of local processes under the name that Hydra accepts."""


class Slurm(SlurmLauncher):
    """The SLURM launcher under the name that Hydra accepts."""
