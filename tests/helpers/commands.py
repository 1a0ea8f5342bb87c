"""A program run as a user types it, in a process of its own, without loading the heavy libraries anew each time."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

# What nearly every run uses. Whether the product loads what it needs by itself, and no more, is asked of processes that
# start with nothing: test_finished.py, test_launchers.py, test_hub.py and the tests that kill programs.
LOADED = (
    "knowledge_compression.configuration",
    "knowledge_compression.results.summary",
    "knowledge_compression.sweeping.cli",
    "knowledge_compression.evaluation.distance",
    "lm_eval.tasks",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
    "sweep_parts",
)


def fresh_processes() -> multiprocessing.context.ForkServerContext:
    """Where tests start processes: each is a copy of one that has done nothing but load the libraries."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(list(LOADED))
    return processes


def run(*command: str, folder: Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a folder; gives its exit status and what it printed.

    Args:
        command: the program's file, then its arguments.
        environment: None for this process's. Libraries have read theirs already, those of this project read it later.
    """
    with tempfile.TemporaryDirectory() as printed:
        settings = dict(os.environ if environment is None else environment)
        process = fresh_processes().Process(target=_begin, args=(command, folder, settings, Path(printed)))
        process.start()
        process.join()
        assert process.exitcode is not None
        said = [(Path(printed) / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command, process.exitcode, *said)


def _begin(command: tuple[str, ...], folder: Path, environment: Mapping[str, str], printed: Path) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = list(command)
    sys.path[:0] = [str(Path(command[0]).parent)]
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a process of this kind leaves out
