"""Where an outputs folder keeps what: finished runs, unfinished ones, the leases on them, sweeps. Known here alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SAVED = "model"  # folder of the compressed model inside a run's folder


@dataclass(frozen=True)
class Layout:
    """The places under one outputs folder.

    Attributes:
        folder: the outputs folder.
    """

    folder: Path

    @property
    def runs(self) -> Path:
        """The folder of finished runs, each in one that has its id for a name."""
        return self.folder / "runs"

    def unfinished(self, run_id: str) -> Path:
        """The folder of an unfinished run, which survives a kill."""
        return self.folder / "unfinished" / run_id

    def lease(self, run_id: str) -> Path:
        """The file that the one process has which makes the run."""
        return self.unfinished(run_id).with_name(f"{run_id}.lock")

    def sweeps_with(self, name: str) -> list[Path]:
        """The files of that name in the folders of sweeps, oldest sweep first."""
        return sorted(self.folder.glob(f"sweeps/*/{name}"))
