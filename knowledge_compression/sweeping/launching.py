"""Launchers: how the jobs of a sweep become processes, here or on a cluster; one job's end is never another's.

Hydra's own SLURM launcher (hydra-submitit-launcher 1.2.0) waits for ever for a job that was killed where the cluster
keeps no accounts, and knows nothing of requeueing or detaching; docs/sweeps.md has the whole reason.
"""

from __future__ import annotations

import getpass
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from knowledge_compression.errors import BadInput
from knowledge_compression.sweeping.plan import DONE, FAILED, OUTCOME, Outcome, labels

log = logging.getLogger(__name__)


@dataclass
class Job:
    """One job of a sweep as another process does it; what it has to tell lies in ``outcome.json`` afterwards."""

    context: HydraContext
    task: TaskFunction
    config: DictConfig
    overrides: Sequence[str]
    number: int
    label: str

    @property
    def folder(self) -> Path:
        """Where its log and its outcome go."""
        return Path(self.config.hydra.sweep.dir) / str(self.number)

    def __call__(self) -> None:
        """Compose the configuration and do the job."""
        setup_globals()
        Plugins.instance()  # a fresh process knows no place for configurations yet
        config = self.context.config_loader.load_sweep_config(self.config, list(self.overrides))
        with open_dict(config):
            config.hydra.job.id = str(self.number)
            config.hydra.job.num = self.number
        HydraConfig.instance().set_config(config)
        run_job(
            task_function=self.task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=self.context,
        )

    def checkpoint(self) -> Any:
        """What submitit hands in again when the job is preempted or at its walltime: the same, as it continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class ProcessLauncher(Launcher):
    """What launchers have in common that give each job a process of its own: starting, watching, trying again."""

    poll_seconds = 0.5

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self.context, self.task, self.config = hydra_context, task_function, config

    def check(self) -> None:
        """Refuse what cannot be launched, before anything is written."""

    @abstractmethod
    def start(self, jobs: Sequence[Job]) -> Mapping[int, Any]:
        """Start those of the jobs that there is room for; gives a handle for each, by the job's number."""

    @abstractmethod
    def ended(self, handles: Mapping[int, Any]) -> Mapping[int, str]:
        """The jobs that are over, and a word on how, for those that did not say so themselves."""

    def stop(self) -> None:
        """What becomes of running jobs when the sweep is given up; on a cluster they go on."""

    @abstractmethod
    def log_of(self, handle: Any) -> str:
        """The file that holds what a job printed."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Do all jobs; a job that dies is tried again as often as ``run.retries`` says and then marked failed."""
        OmegaConf.update(self.config, "hydra.sweep.dir", str(Path(self.config.hydra.sweep.dir).absolute()))
        jobs = [
            Job(self.context, self.task, self.config, list(overrides), initial_job_idx + i, label)
            for i, (overrides, label) in enumerate(zip(job_overrides, labels(job_overrides), strict=True))
        ]
        # The jobs find what this process found, wherever it was started from.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        try:
            outcomes = dict(self._watch(jobs))
        except BaseException:
            self.stop()
            raise
        return [
            JobReturn(overrides=job.overrides, _return_value=outcomes[job.number], status=JobStatus.COMPLETED)
            for job in jobs
            if job.number in outcomes
        ]

    def _watch(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        waiting, tries = deque(jobs), dict.fromkeys((job.number for job in jobs), self.config.run.retries)
        by_number = {job.number: job for job in jobs}
        running: dict[int, Any] = {}
        while waiting or running:
            started = self.start(waiting)
            running |= started
            waiting = deque(job for job in waiting if job.number not in started)
            if self.config.run.detach:
                return
            for number, how in self.ended(running).items():
                job, handle = by_number[number], running.pop(number)
                outcome = Outcome.read(job.folder)
                if outcome is None and tries[number] > 0:
                    tries[number] -= 1
                    sys.stderr.write(f"{job.label}: {how}; trying again\n")
                    waiting.append(job)
                    continue
                if outcome is None:
                    outcome = Outcome(job.label, FAILED, message=how, log=self.log_of(handle))
                    job.folder.mkdir(parents=True, exist_ok=True)
                    outcome.write(job.folder)
                outcome = replace(outcome, label=job.label)
                if outcome.status != DONE:
                    sys.stderr.write(f"{outcome.line}\n")
                yield number, outcome
            time.sleep(self.poll_seconds)


class LocalLauncher(ProcessLauncher):
    """A process a run on this machine, a few at once.

    Args:
        at_once: runs at the same time.
        memory_gb: a run whose processes take more memory together (resident set) is ended; None for no bound.
    """

    def __init__(self, at_once: int = 2, memory_gb: float | None = None) -> None:
        if at_once < 1:
            raise BadInput(f"hydra.launcher.at_once={at_once} starts nothing; give 1 or more")
        self.at_once, self.memory_gb = at_once, memory_gb
        self._running: dict[int, Any] = {}
        self._why: dict[int, str] = {}

    def check(self) -> None:
        """Only a cluster goes on without the process that started the sweep."""
        if self.config.run.detach:
            raise BadInput("run.detach=true needs hydra/launcher=slurm; here the sweep ends with this process")

    def start(self, jobs: Sequence[Job]) -> Mapping[int, Any]:
        """Start as many as there is room for."""
        cores = max(1, (os.cpu_count() or 1) // self.at_once)
        started = {}
        for job in list(jobs)[: self.at_once - len(self._running)]:
            log_file = job.folder / "output.log"
            job.folder.mkdir(parents=True, exist_ok=True)
            with log_file.open("ab") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "knowledge_compression.sweeping.launching"],
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={"OMP_NUM_THREADS": str(cores)} | os.environ,
                )
            assert process.stdin is not None
            process.stdin.write(pickle.dumps(job))
            process.stdin.close()
            self._running[job.number] = started[job.number] = (process, log_file)
        return started

    def ended(self, handles: Mapping[int, Any]) -> Mapping[int, str]:
        """Those whose process is over; those that take too much memory are ended here."""
        over = {}
        for number, (process, _) in handles.items():
            if self.memory_gb is not None and _memory(process.pid) > self.memory_gb * 1e9:
                self._why[number] = f"out of memory: it took more than {self.memory_gb} GB"
                process.kill()
                process.wait()
            if (code := process.poll()) is not None:
                how = f"killed by signal {-code}" if code < 0 else f"ended without a result (status {code})"
                over[number] = self._why.pop(number, how)
                del self._running[number]
        return over

    def log_of(self, handle: Any) -> str:
        """What it printed."""
        return str(handle[1])

    def stop(self) -> None:
        """End what runs."""
        for process, _ in self._running.values():
            process.terminate()


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
            raise BadInput(f"SLURM does not take the jobs: {' '.join(str(error).split())[:300]}") from None
        for job, handle in zip(jobs, handed_in, strict=True):
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "slurm_job").write_text(f"{handle.job_id}\n{handle.paths.stderr}\n")
        log.info("handed in %d runs as job array %s", len(jobs), handed_in[0].job_id.partition("_")[0])
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


def _memory(pid: int) -> int:
    """Resident bytes of a process and its children; 0 where it is over."""
    import psutil

    try:
        process = psutil.Process(pid)
        return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


if __name__ == "__main__":  # one job on this machine, handed over by LocalLauncher
    pickle.load(sys.stdin.buffer)()
