"""The run store: one folder per finished run, named by the hash of what decides its result.

Only what a table of thousands of runs needs is kept in memory: settings, metrics, the report without its layers. Layers
and items are read when needed and not kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from knowledge_compression.errors import BadInput, first_line
from knowledge_compression.heavy import pl
from knowledge_compression.reading import yaml_of
from knowledge_compression.results.layout import Layout
from knowledge_compression.results.lease import LEASE, Holder, holder, leased
from knowledge_compression.results.shape import check_agreement, check_columns, checked, columns_of, finite, read_json
from knowledge_compression.results.workplace import Workplace, discard
from knowledge_compression.writing import write_table

log = logging.getLogger(__name__)

LAYERS = "layers.json"
_ASIDE = ".old"  # suffix of the hidden name of a run that is being replaced
_TOP_LEVEL = re.compile(r"^(?=[^\s\-#])", re.MULTILINE)  # where a key without indentation begins
FORMAT = 2  # of a run folder; raised whenever a reader of old folders would misread new ones
_READ = {1, 2}  # a run of format 1 does not record what decided it, and is compared only with others of its kind


@dataclass
class Run:
    """One finished run.

    Attributes:
        id: hash of what decides the result.
        config: its settings, as plain data.
        metrics: flat names (``atlas.accuracy``) to numbers.
        report: the reports of compression, recovery and each suite, JSON-ready.
        environment: versions, hardware, time, command.
        folder: its folder; None before it is written.
        items_digest: digest of the file of its items as it was written; None if it was not recorded.
    """

    id: str
    config: dict[str, Any]
    metrics: dict[str, float]
    report: dict[str, Any]
    environment: dict[str, Any]
    folder: Path | None = None
    _items: pl.DataFrame | pl.LazyFrame | None = field(default=None, repr=False)
    items_digest: str | None = None

    @property
    def items(self) -> pl.DataFrame:
        """The item table, read on each access."""
        return self.scan_items().collect()

    def answers(self, suite: str, column: str) -> pl.DataFrame:
        """``task, id`` and a column of a suite's items, where it is not null; empty if the items lack the column."""
        items = self.scan_items()
        if column not in items.collect_schema():
            return pl.DataFrame(schema={"task": str, "id": str, column: float})
        return items.filter(pl.col("suite") == suite).select("task", "id", column).drop_nulls().collect()

    def scan_items(self) -> pl.LazyFrame:
        """The item table, as a lazy table: only the columns and rows that are used are read.

        Raises:
            BadInput: the file cannot be read, or lacks columns of a run.
        """
        if self._items is not None:
            return self._items.lazy()
        assert self.folder is not None
        try:
            check_columns(columns_of(self.folder / ITEMS, whole=False))
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.folder / ITEMS} cannot be read ({first_line(error)})") from None
        return pl.scan_parquet(self.folder / ITEMS, glob=False)

    def only(self, condition: pl.Expr) -> Run:
        """The run with only the items that meet a condition, as a lazy table."""
        return replace(self, items_digest=None, _items=self.scan_items().filter(condition))

    @property
    def void(self) -> dict[str, str]:
        """By suite, why its answers are void: they, or weights of the model, are not finite.

        Such a suite gives no figures and is left out of all conclusions. Empty if everything is finite.
        """
        if tensors := list(self.report.get("non_finite_weights", ())):
            more = f" and {len(tensors) - 1} more tensors" if tensors[1:] else ""
            return dict.fromkeys(self.config["eval"], f"weights of the model are not finite ({tensors[0]}{more})")
        told = self.report.get("eval", {})
        return {
            suite: f"{of['not_finite']} of the answers to {suite} are not finite"
            for suite, of in told.items()
            if of.get("not_finite")
        }

    @property
    def taken(self) -> bool:
        """Whether it was made by other tools; then only the statements of the person who took it are known."""
        return "content" in self.config.get("identity", {})

    @property
    def stored_mb(self) -> float | None:
        """The stored size of its model in 10^6 bytes: the compressed weights and the parameters trained by a recovery.

        Adapters are stored in float32. None for a run taken from elsewhere whose size is unknown.
        """
        if self.taken and "stored_bytes" not in self.report["compression"]:
            return None
        trained = self.report.get("recovery", {}).get("trainable_parameters") or 0
        return float(self.report.get("compression", {}).get("stored_bytes", 0) + 4 * trained) / 1e6

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The compression's report on each layer, read on each access; empty if it changed none.

        Raises:
            ValueError: the file is invalid.
        """
        if self.folder is None or "layers" in self.report.get("compression", {}):
            return self.report.get("compression", {}).get("layers", [])
        file = self.folder / LAYERS
        return checked(LAYERS, read_json(file)) if file.is_file() else []


class Unreadable(Exception):
    """A folder of the store that is not a complete run of this version; the message says why."""


def _read_settings(path: Path) -> Any:
    """A YAML file of settings. Runs of a sweep share most sections: each distinct section is parsed once."""
    text = path.read_text()
    try:
        sections = [_section(part) for part in _TOP_LEVEL.split(text) if part]
    except yaml.YAMLError:  # a section refers to another
        return yaml_of(text)
    if not all(isinstance(section, Mapping) for section in sections):
        raise ValueError("it names no values")
    return {name: value for section in sections for name, value in section.items()}


@lru_cache(4096)
def _section(text: str) -> Any:
    return yaml_of(text)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The files of a run that are read with it; large ones are only checked for changes.
_FILES: Mapping[str, Callable[[Path], Any]] = {
    "config.yaml": _read_settings,
    "metrics.json": read_json,
    "report.json": read_json,
    "environment.json": read_json,
}
ITEMS = "items.parquet"
_WRONG = (OSError, ValueError, RecursionError, yaml.YAMLError)  # errors raised by damaged files


class RunStore:
    """Finished runs under ``<folder>/runs``; a folder that exists is complete.

    Args:
        folder: the outputs folder; created when the first run is claimed.
        lease: see :func:`~knowledge_compression.results.lease.leased`; all processes that share the folder must agree
            on it.
    """

    def __init__(self, folder: str | Path, lease: float = LEASE) -> None:
        self.folder, self.lease = Path(folder), lease
        self.layout = Layout(self.folder)

    @property
    def runs_folder(self) -> Path:
        """The folder of the run folders."""
        return self.layout.runs

    def workplace(self, run_id: str) -> Path:
        """The folder for files of an unfinished run; :meth:`write` moves them into the run's folder."""
        return self.layout.unfinished(run_id)

    def holder(self, run_id: str) -> Holder | None:
        """The living process that is making a run, if any."""
        return holder(self.layout.lease(run_id), self.lease)

    @contextmanager
    def claim(self, run_id: str, *, afresh: bool = False) -> Iterator[Workplace]:
        """Claim a run, as the only process on any host; wait if another process is making it.

        Half-written files of a dead attempt are removed; what it finished stays in the workplace.

        Args:
            run_id: the run.
            afresh: discard what an interrupted attempt finished.

        Raises:
            BadInput: the outputs folder cannot be written.
        """
        folder = self.workplace(run_id)
        with ExitStack() as stack:
            with self._writing():
                stack.callback(_remove_if_empty, folder, folder.parent, self.folder)
                stack.enter_context(leased(self.layout.lease(run_id), self.lease))
                for scratch in self.runs_folder.glob(f".{run_id}-*"):
                    shutil.rmtree(scratch)
                if (aside := self._aside(run_id)).is_dir():  # its writer was killed
                    shutil.rmtree(aside) if self._path(run_id).is_dir() else aside.rename(self._path(run_id))
                if afresh:
                    discard(folder)
            yield Workplace(folder)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BadInput(f"output.dir={self.folder} cannot be written ({error.strerror})") from None

    def find(self, run_id: str) -> Run | None:
        """The finished run with that hash, if it exists and can be read; a damaged one is named in the log."""
        found = self.look_up(run_id)
        if isinstance(found, str):
            log.warning("%s is left out: %s", self.runs_folder / run_id, found)
            return None
        return found

    def look_up(self, run_id: str) -> Run | str | None:
        """The finished run with that hash, or why it cannot be read, or None if it does not exist."""
        # A run that is being replaced has another name for an instant, or for longer if its replacer was killed.
        for folder in (self._path(run_id), self._aside(run_id)):
            try:
                if folder.is_dir():
                    return self._read(run_id, folder)
            except Unreadable as error:
                return str(error)
            except PermissionError as error:
                return f"it cannot be read ({error.strerror})"
        return None

    def __iter__(self) -> Iterator[Run]:
        """Every finished run that can be read, by hash; for the others see :meth:`scan`."""
        yield from self.scan()[0]

    def scan(self) -> tuple[list[Run], list[tuple[str, str]]]:
        """Every finished run by hash, and the folders that cannot be read, with reasons.

        A run's folder is written as a whole, so a folder that lacks a file was copied incompletely.
        """
        folders = [path.name for path in self.runs_folder.iterdir()] if self.runs_folder.is_dir() else []
        aside = {name[1 : -len(_ASIDE)] for name in folders if name.startswith(".") and name.endswith(_ASIDE)}
        ids = sorted(aside.union(name for name in folders if not name.startswith(".")))
        found = {run_id: self.look_up(run_id) for run_id in ids}
        runs = [run for run in found.values() if isinstance(run, Run)]
        return runs, [(run_id, why) for run_id, why in found.items() if isinstance(why, str)]

    def __contains__(self, run_id: str) -> bool:
        """Whether the run with that hash exists and can be read."""
        return self.find(run_id) is not None

    def write(self, run: Run, extra_files: Mapping[str, bytes] | None = None) -> Run:
        """Write a run under a temporary name and rename it, so that a half-written folder is never visible.

        A run that it replaces is visible until then, and if this process is killed, one of the two is visible.

        Raises:
            BadInput: the folder cannot be written.
        """
        target, aside = self._path(run.id), self._aside(run.id)
        with self._writing():
            self.runs_folder.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{run.id}-", dir=self.runs_folder))
            try:
                digests = self._fill(scratch, run, extra_files or {})
                if target.exists():  # there is one already: this run is forced, or another process lost its claim
                    shutil.rmtree(aside, ignore_errors=True)
                    target.rename(aside)
                scratch.rename(target)
                _flush(self.runs_folder)
                discard(self.workplace(run.id))  # not earlier: until here a killed run resumes from it
                shutil.rmtree(aside, ignore_errors=True)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        run.folder, run.items_digest = target, digests[ITEMS]
        return run

    def _fill(self, scratch: Path, run: Run, extra_files: Mapping[str, bytes]) -> dict[str, str]:
        """Write all of a run and flush it to the disk; returns the digests of its large files."""
        (scratch / "config.yaml").write_text(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
        compression = dict(run.report.get("compression", {}))
        if layers := compression.pop("layers", None):
            _write_json(scratch / LAYERS, layers)
        _write_json(scratch / "report.json", run.report | ({"compression": compression} if compression else {}))
        write_table(run.items, scratch / ITEMS)
        columns = {name: str(kind) for name, kind in run.items.schema.items()}
        digests = {name: _digest(scratch / name) for name in (ITEMS, LAYERS) if (scratch / name).is_file()}
        about = {"format": FORMAT, "digests": digests, "columns": columns}
        _write_json(scratch / "environment.json", about | run.environment)
        for name, content in extra_files.items():
            (scratch / name).write_bytes(content)
        _write_json(scratch / "metrics.json", run.metrics)
        if (workplace := self.workplace(run.id)).is_dir():
            for path in workplace.iterdir():
                if not path.name.startswith("."):
                    shutil.move(path, scratch / path.name)  # runs/ may be a link to another disk
        for path in scratch.rglob("*"):
            if path.is_file():
                path.chmod((scratch / "config.yaml").stat().st_mode)  # safetensors lets only the owner read
                _flush(path)
        scratch.chmod(0o755)
        return digests

    def _path(self, run_id: str) -> Path:
        return self.runs_folder / run_id

    def _aside(self, run_id: str) -> Path:
        return self.runs_folder / f".{run_id}{_ASIDE}"

    def _read(self, run_id: str, folder: Path) -> Run:
        if missing := [name for name in (*_FILES, ITEMS) if not (folder / name).is_file()]:
            raise Unreadable(f"half-copied: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there")
        content: dict[str, Any] = {}
        with _named("environment.json"):
            content["environment"] = checked("environment.json", read_json(folder / "environment.json"))
        if (
            version := content["environment"].get("format")
        ) not in _READ:  # before its other files are checked by this version's rules
            known = " and ".join(map(str, sorted(_READ)))
            raise Unreadable(f"of another version: its format is {version}, this program reads {known}")
        for name, read in _FILES.items():
            with _named(name):
                content[Path(name).stem] = checked(name, read(folder / name))
        with _named("report.json"):
            check_agreement(content["config"], content["report"])
        noted = content["environment"].pop("digests", None)
        digests: Mapping[str, Any] = noted if isinstance(noted, Mapping) else {}
        columns = content["environment"].pop("columns", None)
        for name in (ITEMS, LAYERS):
            with _named(name):
                if name in digests and digests[name] != _digest(folder / name):
                    raise ValueError("it has changed since it was written")
        with _named(ITEMS):
            if not (ITEMS in digests and isinstance(columns, Mapping)):
                columns = columns_of(folder / ITEMS, whole=ITEMS not in digests)
            check_columns(columns)
        with _named(LAYERS):
            if (folder / LAYERS).is_file() and LAYERS not in digests:
                checked(LAYERS, read_json(folder / LAYERS))
        return Run(id=run_id, folder=folder, items_digest=digests.get(ITEMS), **content)


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Turn errors about a file into a reason to leave its run out."""
    try:
        yield
    except _WRONG as error:
        raise Unreadable(f"damaged: {file} cannot be read ({first_line(error)})") from None


def _write_json(path: Path, content: Any) -> None:
    """JSON has neither nan nor infinity: both become null."""
    path.write_text(json.dumps(finite(content), indent=1, ensure_ascii=False, default=str, allow_nan=False) + "\n")


def _flush(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_empty(*folders: Path) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
