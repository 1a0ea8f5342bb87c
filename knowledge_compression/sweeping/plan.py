"""The record of a sweep: its runs, and the outcome of each job."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from knowledge_compression.errors import BadInput, first_line
from knowledge_compression.results.secrets import hidden

log = logging.getLogger(__name__)

DONE, FAILED, BAD_INPUT = "done", "failed", "bad input"

PLAN, OUTCOME = "plan.json", "outcome.json"
_WHERE = ("run.", "output.", "hydra.", "tracker")  # overrides about where or how a run is done
_PLACES = ("path", "data_dir", "adapter", "device")
# Settings that belong to no single part.
_VALUES = ("sparsity", "reading", "seed", "dtype", "scoring_dtype", "distance", "limit")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one job of a sweep.

    Attributes:
        label: the overrides that distinguish it from the others, e.g. ``target=att sparsity=0.2``.
        status: ``done``, ``failed`` or ``bad input``.
        run_id, baseline_id: the run and its dense baseline, if there are any.
        message: why it failed; one line.
        log: the file with the full log.
        seconds: wall time.
    """

    label: str
    status: str
    run_id: str = ""
    baseline_id: str = ""
    message: str = ""
    log: str = ""
    seconds: float = 0.0

    @property
    def line(self) -> str:
        """One readable line."""
        place = f" (log: {self.log})" if self.log else ""
        return f"{self.status}: {self.label}: {self.message}{place}"

    def write(self, folder: Path) -> None:
        """Store it in the job's folder, completely or not at all; a full disk does not end the sweep."""
        try:
            _write(folder / OUTCOME, asdict(self))
        except OSError as error:
            log.warning("%s cannot be written (%s)", folder / OUTCOME, error.strerror)

    @classmethod
    def read(cls, folder: Path) -> Outcome | None:
        """The outcome of the job of that folder, if it has ended.

        Raises:
            BadInput: the file that says so is damaged.
        """
        try:
            return _OUTCOME.validate_json((folder / OUTCOME).read_bytes(), strict=True)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise BadInput(f"{folder / OUTCOME} cannot be read ({first_line(error)})") from None


@dataclass(frozen=True)
class PlannedRun:
    """One job of a sweep before it starts.

    Attributes:
        overrides: the overrides of its configuration.
        run_id, baseline_id: the run that it will make, and its dense baseline.
        there: whether both were already finished when the sweep was planned, so that nothing needs to start.
    """

    overrides: Sequence[str]
    run_id: str
    baseline_id: str
    there: bool = False


def labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """The label of each job of a sweep: the overrides that not all of them have.

    A single job is labelled by all its overrides about what it does, not where or how.
    """
    if len(jobs) == 1:
        said = [override.lstrip("+") for override in jobs[0]]
        return [" ".join(override for override in said if not override.startswith(_WHERE)) or " ".join(said)]
    common = set.intersection(*map(set, jobs)) if jobs else set()
    told = [[override for override in job if override not in common] or job for job in jobs]
    return [" ".join(override.lstrip("+") for override in job) for job in told]


def settings_typed(overrides: Sequence[str]) -> list[str]:
    """The settings among overrides, each by its last word, e.g. ``bits=3``; not files, places or ways of running."""
    plain = [override.lstrip("+") for override in overrides if not override.lstrip("+").startswith(_WHERE)]
    typed = [override.partition("=") for override in plain]
    return [
        f"{word}={value}"
        for key, _, value in typed
        if ("." in key or key in _VALUES) and (word := key.rpartition(".")[2]) not in _PLACES
    ]


def write_plan(folder: Path, runs: Sequence[PlannedRun], at_once: int, names: Mapping[str, str] | None = None) -> None:
    """Store the plan of a sweep in its folder; job ``i`` has the folder ``<i>`` next to it.

    Args:
        folder: the folder of the sweep.
        runs: its jobs.
        at_once: how many of them run at the same time.
        names: what a tracker calls the runs, by id.
    """
    _write(folder / PLAN, {"at_once": at_once, "runs": [vars(run) for run in runs], "names": dict(names or {})})


def withdraw_plan(folder: Path) -> None:
    """Remove the plan of a sweep of which no job was started, so that none of them counts as missing."""
    runs, _ = read_plan(folder)
    if not any((folder / str(number)).exists() for number in range(len(runs))):
        (folder / PLAN).unlink()


def read_plan(folder: Path) -> tuple[list[PlannedRun], int]:
    """The jobs of a sweep, and the number that run simultaneously.

    Raises:
        BadInput: the file that says so is damaged.
    """
    plan = _plan(folder)
    return plan["runs"], plan["at_once"]


def planned_names(folder: Path) -> dict[str, str]:
    """What a tracker calls the runs of a sweep, by id; empty if a sweeper made it that writes no plan.

    Raises:
        BadInput: the file that says so is damaged.
    """
    return _plan(folder).get("names", {}) if (folder / PLAN).exists() else {}


class _Plan(TypedDict):
    at_once: int
    runs: list[PlannedRun]
    names: NotRequired[dict[str, str]]


def _plan(folder: Path) -> _Plan:
    try:
        return _SWEEP.validate_json((folder / PLAN).read_bytes(), strict=True)
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / PLAN} cannot be read ({first_line(error)})") from None


_SWEEP, _OUTCOME = TypeAdapter(_Plan), TypeAdapter(Outcome)


def _write(path: Path, content: object) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(json.dumps(hidden(content), indent=1, ensure_ascii=False) + "\n")
    scratch.rename(path)
