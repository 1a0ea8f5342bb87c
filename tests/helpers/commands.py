"""A program run as a user types it, in a process of its own, without loading the heavy libraries anew each time."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from helpers import stand_in_gpu
from knowledge_compression.models import device

GPUS = "KC_TEST_GPUS"  # in a program's environment: how many stand-ins for GPUs it has

# What nearly every run uses. Whether the product loads what it needs by itself, and no more, is asked of processes that
# start with nothing: test_finished.py, test_launchers.py, test_hub.py and the tests that kill programs.
LOADED = (
    "knowledge_compression.configuration",
    "knowledge_compression.running",
    "knowledge_compression.results.summary",
    "knowledge_compression.sweeping.cli",
    "knowledge_compression.results.drawing",
    "knowledge_compression.models.checkpoints.recognised",
    "knowledge_compression.evaluation.distance",
    "hydra_plugins.knowledge_compression",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "lm_eval.tasks",
    "peft",
    "transformers.convert_slow_tokenizer",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "sweep_parts",
    "helpers.first_uses",
)


def fresh_processes() -> multiprocessing.context.ForkServerContext:
    """Where tests start processes: each is a copy of one that has done nothing but load the libraries.

    Beside a GPU each loads them itself: a driver that a library has asked for anything does not survive the copying.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([] if device.kind_of("auto") != "cpu" else list(LOADED))
    return processes


class Started:
    """A program that was started, to be waited for or killed as a ``subprocess.Popen`` is."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, waited for."""
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it as ``kill -9`` does."""
        self.send_signal(signal.SIGKILL)


def start(
    *command: str, folder: Path, stdout: Path, stderr: Path, environment: Mapping[str, str] | None = None
) -> Started:
    """Start a Python program in a folder and in a session of its own.

    Args:
        command: the program's file, then its arguments.
        folder: where it runs.
        stdout, stderr: files to whose end it writes what it says; may be one.
        environment: None for this process's. Libraries have read theirs already, those of this project read it later.
    """
    settings = dict(os.environ if environment is None else environment)
    process = fresh_processes().Process(target=_begin, args=(command, folder, settings, stdout, stderr))
    process.start()
    return Started(process)


def start_anew(
    *command: str, folder: Path, stdout: Path, stderr: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """As :func:`start`, in a process that starts with nothing, as users' do."""
    with stdout.open("ab") as said, stderr.open("ab") as warned:
        return subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=said, stderr=warned, start_new_session=True
        )


def run(*command: str, folder: Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end; gives its exit status and what it printed. For the arguments see ``start``."""
    return _ended(start, *command, folder=folder, environment=environment)


def run_anew(
    *command: str, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As :func:`run`, in a process that starts with nothing, as users' do."""
    return _ended(start_anew, *command, folder=folder, environment=environment)


def _ended(begin: Callable[..., Any], *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as printed:
        files = [Path(printed) / name for name in ("stdout", "stderr")]
        program = begin(*command, stdout=files[0], stderr=files[1], **options)
        try:
            status = program.wait()
        finally:
            program.kill()  # where these tests are told to stop
        return subprocess.CompletedProcess(command, status, *(file.read_text() for file in files))


def _begin(command: tuple[str, ...], folder: Path, environment: Mapping[str, str], stdout: Path, stderr: Path) -> None:
    os.setsid()
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = list(command)
    sys.path[:0] = [str(Path(command[0]).parent)]
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if gpus := int(environment.get(GPUS, 0)):
        stand_in_gpu.begin(gpus)
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a process of this kind leaves out
