"""A job array on SLURM, a task a run.

Hydra's own SLURM launcher (hydra-submitit-launcher 1.2.0) waits for ever for a job that was killed where the cluster
keeps no accounts, and knows nothing of requeueing or detaching; docs/sweeps.md has the whole reason.
"""

from __future__ import annotations

import getpass
import logging
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knowledge_compression.errors import BadInput
from knowledge_compression.sweeping.launching import Job, ProcessLauncher
from knowledge_compression.sweeping.plan import OUTCOME

log = logging.getLogger(__name__)


class SlurmLauncher(ProcessLauncher):
    """One job array on SLURM, through submitit.

    Args:
        partition, account, qos, constraint: where the jobs go; None for the cluster's defaults.
        gpus, cpus, memory_gb: what each run gets.
        minutes: walltime of one run.
        at_once: tasks of the array that run at the same time.
        requeues: how often a run may be stopped by its walltime and continued; preemptions are not counted.
        setup: shell lines before the run.
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
        self.partition, self.at_once, self.requeues = partition, at_once, requeues
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
        """Refuse where there is no SLURM, or no such partition."""
        if shutil.which("sbatch") is None:
            raise BadInput("hydra/launcher=slurm needs SLURM's sbatch and squeue, which are not here; try local")
        there = {name.rstrip("*") for name in _slurm("sinfo", "-h", "-o", "%P").split()}
        if self.partition is not None and self.partition not in there:
            raise BadInput(
                f"hydra.launcher.partition={self.partition} does not exist; choose one of {', '.join(sorted(there))}"
            )

    def start(self, jobs: Sequence[Job]) -> Mapping[int, Any]:
        """Hand all of them in as one array."""
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError

        if not jobs:
            return {}
        executor = SlurmExecutor(
            folder=Path(self.config.hydra.sweep.dir) / ".submitit" / "%j", max_num_timeout=self.requeues
        )
        executor.update_parameters(job_name="knowledge_compression", **self._parameters)
        try:
            with executor.batch():
                handed_in = [executor.submit(job) for job in jobs]
        except FailedJobError as error:
            raise BadInput(f"SLURM refused the jobs: {' '.join(str(error).split())[:300]}") from None
        for job, handle in zip(jobs, handed_in, strict=True):
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "slurm_job").write_text(f"{handle.job_id}\n{handle.paths.stderr}\n")
        log.info("submitted %d runs as job array %s", len(jobs), handed_in[0].job_id.partition("_")[0])
        return {job.number: handle for job, handle in zip(jobs, handed_in, strict=True)}

    def ended(self, handles: Mapping[int, Any]) -> Mapping[int, str]:
        """Those that told their outcome, and those that SLURM has not known for a while: they were killed."""
        try:
            alive = living_jobs()
        except BadInput as error:  # SLURM may be away for a moment; nothing is concluded from that
            log.warning("%s", error)
            return {}
        over = {}
        for number, handle in handles.items():
            self._unseen[number] = 0 if handle.job_id in alive else self._unseen.get(number, 0) + 1
            told = (Path(self.config.hydra.sweep.dir) / str(number) / OUTCOME).is_file()
            if self._unseen[number] and (told or self._unseen[number] > 3):  # a shared file may be late
                over[number] = f"ended by SLURM without a result ({how_it_ended(handle.job_id)})"
                del self._unseen[number]
        return over

    def log_of(self, handle: Any) -> str:
        """What it printed."""
        return str(handle.paths.stderr)


def living_jobs() -> set[str]:
    """Ids of this user's jobs that wait or run, tasks of arrays as ``<array>_<task>``.

    Raises:
        BadInput: SLURM does not answer.
    """
    return set(_slurm("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%i").split())


def how_it_ended(job_id: str) -> str:
    """What SLURM's accounts say of a job that is over, e.g. ``OUT_OF_MEMORY``."""
    try:
        states = _slurm("sacct", "-n", "-X", "-j", job_id, "-o", "State%30").split()
    except BadInput:
        return "the cluster keeps no accounts"
    return states[0] if states else "unknown"


def _slurm(*command: str) -> str:
    """What one of SLURM's commands prints."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise BadInput(f"SLURM does not answer ({command[0]}: {' '.join(str(said).split())[:200]})") from None
