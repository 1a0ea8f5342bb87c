"""Tries one input in a process of its own, and says how it ended."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from threading import Lock
from typing import Any

from trials.materials import copy

ONE_LINE, ACCEPTED, STACK_TRACE, WRONG, HANG = "one line", "accepted", "stack trace", "accepted wrongly", "hang"
REFUSE, EITHER, ACCEPT = "refuse", "either", "accept"
PATIENCE = 120.0  # seconds of the wall's clock for what takes about one of the processor's
_PRELOADED = (
    "encodings.unicode_escape",
    "encodings.utf_8_sig",  # a trial without privileges may not be able to read the standard library
    "knowledge_compression.configuration",
    "knowledge_compression.results.summary",
    "knowledge_compression.commands",
    "knowledge_compression.sweeping.cli",
    "knowledge_compression.report",
    "knowledge_compression.results.drawing",
    "knowledge_compression.models.checkpoints.recognised",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "lm_eval.tasks",
    "lm_eval.models.huggingface",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "trials.inputs",
)


@dataclass(frozen=True)
class Trial:
    """One input.

    Attributes:
        name: what is wrong with it.
        arguments: of the command line; paths are those of a copy of the sound material.
        spoil: makes it wrong, in that copy.
        must: ``refuse``; ``either``, where it may be sound after all: then its run is not that of what it was before;
            ``accept`` for what nothing is wrong with.
        command: of ``kc``.
        decides: whether every byte that is spoilt makes another run; what a YAML file says does, not how.
        nobody: whether to go without the privileges of a super-user.
    """

    name: str
    arguments: Sequence[str]
    spoil: Callable[[Path], None] | None = None
    must: str = REFUSE
    command: str = "run"
    nobody: bool = False
    decides: bool = True


@dataclass
class Ending:
    """How a trial ended.

    Attributes:
        trial: which.
        how: one of the kinds above.
        said: what it wrote on its standard error, or why that is wrong.
        runs: ids of the runs that it left.
        seconds: of the wall's clock.
    """

    trial: Trial
    how: str
    said: str = ""
    runs: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Tester:
    """Tries inputs.

    Args:
        good: the sound material.
        scratch: where the copies of it lie.
    """

    __test__ = False  # its name begins as pytest's classes of tests do

    def __init__(self, good: Path, scratch: Path) -> None:
        self.good, self.scratch = good, scratch
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(list(_PRELOADED))
        self._sound: dict[str, list[str]] = {}
        self._alone = Lock()  # a start looks at all processes, and a status that two threads ask for is lost

    def all(self, trials: Sequence[Trial], at_once: int) -> Iterator[Ending]:
        """Every trial's ending as it comes, those with nothing wrong first: they say what the others may not be."""
        controls = [trial for trial in trials if trial.must == ACCEPT]
        with ThreadPoolExecutor(at_once) as pool:
            for some in (controls, [trial for trial in trials if trial.must != ACCEPT]):
                yield from pool.map(self.one, some)

    def one(self, trial: Trial) -> Ending:
        """Try one."""
        here = self.scratch / f"{abs(hash((trial.name, *trial.arguments))):x}"
        process = self._processes.Process(target=_try, args=(trial, str(self.good), str(here)))
        start = time.perf_counter()
        with self._alone:
            process.start()
        hangs = not wait([process.sentinel], PATIENCE)
        with self._alone:
            if hangs:
                process.kill()
            process.join()
        if hangs:
            return Ending(trial, HANG, seconds=PATIENCE)
        ending = self._judged(trial, here, process.exitcode)
        ending.seconds = time.perf_counter() - start
        shutil.rmtree(here, ignore_errors=True)
        return ending

    def _judged(self, trial: Trial, here: Path, status: int | None) -> Ending:
        there = (here / "stderr").is_file()
        errors = (here / "stderr").read_text(errors="replace") if there else "it did not begin"
        said = [line for line in errors.splitlines() if line.startswith("error: ")]
        runs = [path for path in (here / "out" / "runs").glob("*") if not path.name.startswith(".")]
        ids = sorted(path.name for path in runs)
        if "Traceback (most recent call last)" in errors or status not in (0, 2):
            return Ending(trial, STACK_TRACE, f"status {status}\n{errors}", ids)
        if status == 2:
            if len(said) != 1:
                return Ending(trial, STACK_TRACE, f"{len(said)} lines of error\n{errors}", ids)
            if runs:
                return Ending(trial, WRONG, f"refused, and yet a run is there: {said[0]}", ids)
            return Ending(trial, ONE_LINE if trial.must != ACCEPT else WRONG, said[0], ids)
        if trial.must == REFUSE:
            return Ending(trial, WRONG, "status 0", ids)
        for path in runs:
            if why := _not_sound(path):
                return Ending(trial, WRONG, why, ids)
        kind = " ".join(trial.arguments)
        if trial.must == ACCEPT:
            self._sound[kind] = ids
        elif trial.decides and trial.spoil is not None and ids and ids == self._sound.get(kind):
            return Ending(trial, WRONG, "the run of what it was before", ids)
        return Ending(trial, ACCEPTED, "", ids)


def _not_sound(run: Path) -> str | None:
    """Why a run's figures are no JSON, or no numbers; None where they are."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"it holds {constant}")

    try:
        for name in ("metrics.json", "report.json"):
            json.loads((run / name).read_text(), parse_constant=refuse)
    except (OSError, ValueError) as error:
        return f"{run.name}: {error}"
    return None


def _try(trial: Trial, good: str, here: str) -> None:
    """Runs in a process of its own; leaves ``stderr`` and what the command wrote."""
    folder = Path(here)
    folder.mkdir(parents=True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o666), number)
    copy(Path(good), folder)
    if trial.spoil is not None:
        trial.spoil(folder)
    os.chdir(folder)
    os.environ |= {"KC_CACHE_DIR": f"{here}/cache", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    if trial.nobody and os.getuid() == 0:
        folder.chmod(0o777)
        os.setgid(65534)
        os.setuid(65534)
    sys.path.insert(0, str(folder))
    sys.argv = ["kc", trial.command, *trial.arguments]
    import torch
    from huggingface_hub import constants

    from knowledge_compression.commands import main

    torch.set_num_threads(1)
    constants.HF_HUB_OFFLINE = True
    sys.exit(main())
