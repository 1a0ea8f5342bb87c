"""The run store: one folder a finished run, named by the hash of what decides its result."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from knowledge_compression.errors import BadInput

FORMAT = 1  # of a run folder; raised when a reader of old folders would misread new ones


@dataclass
class Run:
    """One finished run.

    Attributes:
        id: hash of what decides the result.
        config: the settings it was made with, as plain data.
        metrics: flat names (``atlas.accuracy``) to numbers.
        report: what compression, recovery and each suite say of themselves, JSON-ready.
        environment: versions, hardware, time, command.
        folder: where it lies; None before it is written.
    """

    id: str
    config: dict[str, Any]
    metrics: dict[str, float]
    report: dict[str, Any]
    environment: dict[str, Any]
    folder: Path | None = None
    _items: pl.DataFrame | None = field(default=None, repr=False)

    @cached_property
    def items(self) -> pl.DataFrame:
        """The item table, read when it is asked for."""
        if self._items is not None:
            return self._items
        assert self.folder is not None
        return pl.read_parquet(self.folder / "items.parquet")


class RunStore:
    """Finished runs under ``<folder>/runs``; a folder that is there is whole.

    Args:
        folder: the outputs folder; it is made when the first run is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def runs_folder(self) -> Path:
        """Where the run folders lie."""
        return self.folder / "runs"

    def workplace(self, run_id: str) -> Path:
        """Where an unfinished run puts files that outlive it; :meth:`write` moves them into the run's folder."""
        return self.folder / "unfinished" / run_id

    def find(self, run_id: str) -> Run | None:
        """The finished run of that hash, if it is there."""
        folder = self.runs_folder / run_id
        return self._read(folder) if (folder / "metrics.json").is_file() else None

    def __iter__(self) -> Iterator[Run]:
        """Every finished run, by hash."""
        if self.runs_folder.is_dir():
            for folder in sorted(self.runs_folder.iterdir()):
                if not folder.name.startswith(".") and (folder / "metrics.json").is_file():
                    yield self._read(folder)

    def write(self, run: Run, extra_files: Mapping[str, bytes] | None = None) -> Run:
        """Write a run under a temporary name and rename it, so that no half-written folder is ever seen.

        Raises:
            BadInput: the folder cannot be written.
        """
        target = self.runs_folder / run.id
        try:
            self.runs_folder.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{run.id}-", dir=self.runs_folder))
        except OSError as error:
            raise BadInput(f"output.dir={self.folder} cannot be written ({error.strerror})") from None
        try:
            (scratch / "config.yaml").write_text(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
            _write_json(scratch / "report.json", run.report)
            _write_json(scratch / "environment.json", {"format": FORMAT} | run.environment)
            run.items.write_parquet(scratch / "items.parquet")
            for name, content in (extra_files or {}).items():
                (scratch / name).write_bytes(content)
            _write_json(scratch / "metrics.json", run.metrics)
            if (workplace := self.workplace(run.id)).is_dir():
                for path in workplace.iterdir():
                    path.rename(scratch / path.name)
                workplace.rmdir()
            for path in scratch.rglob("*"):
                if path.is_file():
                    _flush(path)
            if target.exists():  # a forced run replaces the one that was there
                shutil.rmtree(target)
            scratch.chmod(0o755)
            scratch.rename(target)
        except OSError as error:
            raise BadInput(f"output.dir={self.folder} cannot be written ({error.strerror})") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        run.folder = target
        return run

    def _read(self, folder: Path) -> Run:
        return Run(
            id=folder.name,
            config=yaml.load((folder / "config.yaml").read_text(), Loader=yaml.CSafeLoader),
            metrics=json.loads((folder / "metrics.json").read_text()),
            report=json.loads((folder / "report.json").read_text()),
            environment=json.loads((folder / "environment.json").read_text()),
            folder=folder,
        )


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
