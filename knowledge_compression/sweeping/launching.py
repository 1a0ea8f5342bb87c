"""The common part of launchers: each run of a sweep gets its own process, so one that dies does not affect others.

``local`` starts the processes on this machine, ``slurm`` submits them to a cluster.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from pydantic import Field

from knowledge_compression.building import fitting
from knowledge_compression.sweeping.plan import DONE, FAILED, Outcome, labels

log = logging.getLogger(__name__)

AtLeast0, AtLeast1 = Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


def check_numbers(hint: Any, given: Mapping[str, Any]) -> None:
    """Refuse settings of a launcher, by name, that are not such numbers.

    Raises:
        BadInput: one is not; the message names it and says what would be accepted.
    """
    for name, value in given.items():
        fitting(f"hydra.launcher.{name}", value, hint)


@dataclass
class Job:
    """One job of a sweep, done in another process, which writes its outcome to ``outcome.json``."""

    context: HydraContext
    task: TaskFunction
    config: DictConfig
    overrides: Sequence[str]
    number: int
    label: str

    @property
    def folder(self) -> Path:
        """The folder of its log and its outcome."""
        return Path(self.config.hydra.sweep.dir) / str(self.number)

    def __call__(self) -> None:
        """Compose the configuration and do the job."""
        setup_globals()
        Plugins.instance()  # a new process has no configuration search path yet
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
        """The job that submitit resubmits after preemption or at the walltime: the same one, because it resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class ProcessLauncher(Launcher):
    """The base class of launchers that give each job its own process: starting, monitoring, retrying."""

    poll_seconds = 0.5

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self.context, self.task, self.config = hydra_context, task_function, config

    def check(self) -> None:
        """Refuse settings with which nothing can be launched, before anything is written."""

    @abstractmethod
    def start(self, jobs: Sequence[Job]) -> Mapping[int, Any]:
        """Start as many of the jobs as there is room for; returns a handle for each, by job number."""

    @abstractmethod
    def ended(self, handles: Mapping[int, Any]) -> Mapping[int, str]:
        """The jobs that have ended, with the reason for those that left no outcome."""

    def stop(self) -> None:
        """Handle running jobs when the sweep is interrupted; on a cluster they continue."""

    @abstractmethod
    def log_of(self, handle: Any) -> str:
        """The file that holds what a job printed."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Do all jobs; a job that dies is retried ``run.retries`` times and then marked as failed."""
        OmegaConf.update(self.config, "hydra.sweep.dir", str(Path(self.config.hydra.sweep.dir).absolute()))
        jobs = [
            Job(self.context, self.task, self.config, list(overrides), initial_job_idx + i, label)
            for i, (overrides, label) in enumerate(zip(job_overrides, labels(job_overrides), strict=True))
        ]
        # Jobs resolve paths like this process, whatever the working directory.
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
                    sys.stderr.write(f"{job.label}: {how}; retrying\n")
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
