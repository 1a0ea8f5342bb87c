"""The layout of an outputs folder: finished runs, unfinished ones, their leases, and sweeps. Defined only here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SAVED = "model"  # folder of the compressed model inside a run's folder


@dataclass(frozen=True)
class Layout:
    """The paths under one outputs folder.

    Attributes:
        folder: the outputs folder.
    """

    folder: Path

    @property
    def runs(self) -> Path:
        """The folder of finished runs, each in a folder named by its id."""
        return self.folder / "runs"

    def unfinished(self, run_id: str) -> Path:
        """The folder of an unfinished run, which survives a kill."""
        return self.folder / "unfinished" / run_id

    def lease(self, run_id: str) -> Path:
        """The lease file held by the process that is making the run."""
        return self.unfinished(run_id).with_name(f"{run_id}.lock")

    def sweeps_with(self, name: str) -> list[Path]:
        """The files with that name in the folders of sweeps, oldest sweep first."""
        return sorted(self.folder.glob(f"sweeps/*/{name}"))
