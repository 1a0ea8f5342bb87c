"""A job array on SLURM, with one task per run.

Hydra's own SLURM launcher (hydra-submitit-launcher 1.2.0) waits forever for a killed job if the cluster has no
accounting, and supports neither requeueing nor detaching; docs/sweeps.md explains this.
"""

from __future__ import annotations

import getpass
import logging
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.results.layout import Layout
from knowledge_compression.sweeping.launching import AtLeast0, AtLeast1, Job, Positive, ProcessLauncher, check_numbers
from knowledge_compression.sweeping.plan import PLAN, Outcome, PlannedRun, read_plan

log = logging.getLogger(__name__)

_SHOWN = 5  # runs that a line names
NOTE = "slurm_job"  # in a job's folder: the id of its SLURM job, and the path of that job's log


@dataclass(frozen=True)
class HandedIn:
    """A SLURM job that does a run, whichever sweep submitted it.

    Attributes:
        job_id: its id in SLURM.
        log: the file with its output.
        folder: the folder of its outcome.
    """

    job_id: str
    log: str
    folder: Path

    @property
    def array(self) -> str:
        """The job array to which it belongs."""
        return self.job_id.partition("_")[0]

    @classmethod
    def of(cls, folder: Path) -> HandedIn | None:
        """The SLURM job submitted for that folder, if any."""
        try:
            job_id, log, *_ = (folder / NOTE).read_text().split("\n")
        except (OSError, ValueError):
            return None
        return cls(job_id, log, folder)

    def write(self, folder: Path) -> None:
        """Record it in the folder of a job that it does."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NOTE).write_text(f"{self.job_id}\n{self.log}\n")


class SlurmLauncher(ProcessLauncher):
    """One job array on SLURM, through submitit.

    Args:
        partition, account, qos, constraint: passed to SLURM; None for the cluster's defaults. Of several partitions
            with commas between them, SLURM takes the first that has room.
        gpus, cpus, memory_gb: what each run gets.
        minutes: walltime of one run.
        at_once: number of tasks of the array that run simultaneously.
        requeues: how often a run may be continued after reaching its walltime; preemptions do not count.
        setup: shell commands before the run.
        options: other options of ``sbatch``.
    """

    poll_seconds = 2.0

    def __init__(
        self,
        *,
        partition: str | None = None,
        gpus: int = 1,
        cpus: int = 4,
        memory_gb: float = 32,
        minutes: int = 1440,
        at_once: int = 64,
        requeues: int = 10,
        account: str | None = None,
        qos: str | None = None,
        constraint: str | None = None,
        setup: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        check_numbers(AtLeast1, {"cpus": cpus, "minutes": minutes, "at_once": at_once})
        check_numbers(AtLeast0, {"gpus": gpus, "requeues": requeues})
        check_numbers(Positive, {"memory_gb": memory_gb})
        self.partition, self.at_once, self.requeues, self.gpus = partition, at_once, requeues, gpus
        wanted = {
            "slurm_partition": partition,
            "slurm_account": account,
            "slurm_qos": qos,
            "slurm_constraint": constraint,
            "slurm_gpus_per_node": gpus or None,
            "slurm_cpus_per_task": cpus,
            "slurm_mem": f"{round(memory_gb * 1000)}M",
            "slurm_time": minutes,
            "slurm_array_parallelism": at_once,
            "slurm_signal_delay_s": min(90, 20 * minutes),
            "slurm_setup": list(setup) or None,
            "slurm_additional_parameters": {"requeue": True} | dict(options or {}),
        }
        self._parameters = {name.removeprefix("slurm_"): value for name, value in wanted.items() if value is not None}
        self._unseen: dict[int, int] = {}

    def check(self) -> None:
        """Refuse if there is no SLURM, no such partition, or if a run would get fewer GPUs than it has processes."""
        if shutil.which("sbatch") is None:
            raise BadInput(
                "hydra/launcher=slurm needs SLURM's sbatch and squeue, which are not installed here; try local"
            )
        processes = self.config.run.processes
        if self.gpus and isinstance(processes, int) and processes > self.gpus:
            raise BadInput(
                f"run.processes={processes} needs a GPU per process, but hydra.launcher.gpus={self.gpus} gives a run "
                f"too few; give hydra.launcher.gpus={processes}, or hydra.launcher.gpus=0 to use the CPU"
            )
        there = {name.rstrip("*") for name in _slurm("sinfo", "-a", "-h", "-o", "%P").split()}  # hidden ones too
        wanted = set(filter(None, str(self.partition or "").split(",")))
        if absent := sorted(wanted - there):
            raise BadInput(
                f"hydra.launcher.partition={','.join(absent)} does not exist; choose one of {', '.join(sorted(there))}"
            )

    def start(self, jobs: Sequence[Job]) -> Mapping[int, Any]:
        """Submit, as one array, the jobs not already submitted by an earlier start; those are waited for."""
        held = {} if self.config.run.force else self._held(jobs)
        handed_in = held | self._submitted([job for job in jobs if job.number not in held])
        for job in jobs:
            handed_in[job.number].write(job.folder)
        return handed_in

    def _held(self, jobs: Sequence[Job]) -> dict[int, HandedIn]:
        """By job number, the pending or running SLURM job that does the same run with the same settings."""
        if not jobs:
            return {}
        here = Path(self.config.hydra.sweep.dir)
        others = [path.parent for path in Layout(Path(self.config.output.dir)).sweeps_with(PLAN)]
        others = [folder for folder in others if folder.absolute() != here.absolute()]
        if not others:
            return {}
        alive = living_jobs()
        doing: dict[Any, HandedIn] = {}
        for folder in others:
            try:
                planned, _ = read_plan(folder)
            except BadInput as error:
                log.warning("%s", error)
                continue
            for number, run in enumerate(planned):
                handed_in = HandedIn.of(folder / str(number))
                if handed_in is not None and handed_in.job_id in alive:
                    doing[_what(run)] = handed_in
        runs, _ = read_plan(here)
        held = {job.number: found for job in jobs if (found := doing.get(_what(runs[job.number]))) is not None}
        by_array = defaultdict(list)
        for job in jobs:
            if job.number in held:
                by_array[held[job.number].array].append(job.label)
        for array, labels in by_array.items():
            shown = ", ".join(labels[:_SHOWN]) + (", ..." if labels[_SHOWN:] else "")
            log.info("%d runs are queued or running already, as job array %s: %s", len(labels), array, shown)
        return held

    def _submitted(self, jobs: Sequence[Job]) -> dict[int, HandedIn]:
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError

        if not jobs:
            return {}
        executor = SlurmExecutor(
            folder=Path(self.config.hydra.sweep.dir) / ".submitit" / "%j", max_num_timeout=self.requeues
        )
        executor.update_parameters(job_name="knowledge_compression", **self._parameters)
        try:
            with redirect_stderr(StringIO()), executor.batch():  # submitit prints what sbatch said, and raises it too
                handed_in = [executor.submit(job) for job in jobs]
        except FailedJobError as error:
            raise BadInput(f"SLURM refused the jobs: {self._said(error)}") from None
        found = {
            job.number: HandedIn(handle.job_id, str(handle.paths.stderr), job.folder)
            for job, handle in zip(jobs, handed_in, strict=True)
        }
        log.info("submitted %d runs as job array %s", len(jobs), found[jobs[0].number].array)
        return found

    def _said(self, error: Exception) -> str:
        """Why SLURM refused jobs, in one line."""
        said = " ".join(str(error).split())[:300]
        if self.gpus and "generic resource" in said:  # sbatch does not say that it means GPUs
            said += (
                f"; hydra.launcher.gpus={self.gpus} asks for GPUs that these nodes do not have, "
                "hydra.launcher.gpus=0 runs on their processors"
            )
        return said

    def ended(self, handles: Mapping[int, HandedIn]) -> Mapping[int, str]:
        """The jobs that left an outcome, and those that SLURM has not listed for a while: they were killed."""
        try:
            alive = living_jobs()
        except BadInput as error:  # SLURM may be unavailable for a moment, which means nothing
            log.warning("%s", error)
            return {}
        over = {}
        for number, handle in handles.items():
            self._unseen[number] = 0 if handle.job_id in alive else self._unseen.get(number, 0) + 1
            told = Outcome.read(handle.folder)
            if self._unseen[number] and (told or self._unseen[number] > 3):  # a shared file may appear late
                if told:  # maybe to another sweep
                    told.write(Path(self.config.hydra.sweep.dir) / str(number))
                over[number] = f"ended by SLURM without a result ({how_it_ended(handle.job_id)})"
                del self._unseen[number]
        return over

    def log_of(self, handle: HandedIn) -> str:
        """What it printed."""
        return handle.log


def _what(run: PlannedRun) -> tuple[str, str, frozenset[str]]:
    """What a job of an outputs folder does and how, independent of its sweep and of the way that sweep was started."""
    how = (override for override in run.overrides if not override.startswith(("run.", "output.dir=")))
    return run.run_id, run.baseline_id, frozenset(how)


def living_jobs() -> set[str]:
    """Ids of this user's pending and running jobs, with array tasks as ``<array>_<task>``.

    Raises:
        BadInput: SLURM does not answer.
    """
    return set(_slurm("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i").split())


def how_it_ended(job_id: str) -> str:
    """The state of an ended job in SLURM's accounting, e.g. ``OUT_OF_MEMORY``."""
    try:
        states = _slurm("sacct", "-n", "-X", "-j", job_id, "-o", "State%30").split()
    except BadInput:
        return "the cluster has no accounting"
    return states[0] if states else "unknown"


def _slurm(*command: str) -> str:
    """The output of a SLURM command."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise BadInput(f"SLURM does not answer ({command[0]}: {' '.join(str(said).split())[:200]})") from None
