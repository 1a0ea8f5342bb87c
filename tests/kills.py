"""Kill sweeps at random moments, start them again, and count what that cost.

    python tests/kills.py --kills 30                                  # over all three launchers; SLURM needs root
    python tests/kills.py --kills 4 --launchers local --seed 1

A sweep of real runs (``model=bert_tiny``, compressed and recovered by LoRA) is started by the command that users type,
and killed by SIGKILL, SIGTERM or SIGINT at a moment of one of these kinds: at any, while it trains, while a compression
is being kept, in the middle of its third run. On SLURM, SIGKILL takes a job where one runs. Then the same command is
started again. Counted:

- lost: results that were there before and are not any more, and results at the end that are missing or are not, number
  by number, those of a sweep that nobody disturbed.
- done twice: finished runs, kept compressions and finished trainings that were made again.
- orphans: processes of a killed command that still run. On SLURM jobs go on, and are SLURM's; there a process is an
  orphan once SLURM has no job of it any more.

The exit status is 0 where all three are 0, and no status and no time was other than it should.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import psutil

from helpers import commands
from knowledge_compression.stopping import stoppable

ROOT = Path(__file__).parents[1]
LAUNCHERS = ("basic", "local", "slurm")
PATIENCE = 600.0  # seconds for anything to happen before it counts as hanging
MARK = "KC_KILLS"  # a variable that only the processes of one sweep have
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}

SWEEP = ["model=bert_tiny", "target=all", "sparsity=0.2,0.6", "recovery=lora", "recovery.training.tokens=1920"]
SWEEP += ["recovery.training.batch_size=4", "recovery.training.precision=float32"]  # 15 steps
SWEEP += ["recovery.training.checkpoint_every=10", "corpus.samples=32", "corpus.length=32", "limit=60", "device=cpu"]
RUNS = 3  # two, and the dense baseline


@dataclass
class Sweep:
    """One sweep in a folder of its own, started as often as it is killed."""

    folder: Path
    launcher: str
    environment: dict[str, str]
    begin: Callable[..., subprocess.Popen[bytes] | commands.Started]  # how the command is started
    process: subprocess.Popen[bytes] | commands.Started | None = None

    def __post_init__(self) -> None:
        self.outputs, self.cache = self.folder / "outputs", self.folder / "cache"
        self.environment = self.environment | {
            MARK: str(self.folder),
            "KC_CACHE_DIR": str(self.cache),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }

    def start(self) -> None:
        """Start the command; what it says goes to ``log`` in the folder."""
        options = {"local": ["hydra.launcher.at_once=2"], "slurm": ["hydra.launcher.gpus=0", "hydra.launcher.cpus=1"]}
        command = [str(ROOT / "run.py"), "-m", f"hydra/launcher={self.launcher}", *SWEEP]
        command += [f"output.dir={self.outputs}", *options.get(self.launcher, [])]
        self.folder.mkdir(parents=True, exist_ok=True)
        said = self.folder / "log"
        self.process = self.begin(*command, folder=ROOT, stdout=said, stderr=said, environment=self.environment)

    def processes(self) -> list[psutil.Process]:
        """All that still run for the sweep: in the session of its last start, or marked, wherever in the tree."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                its = self.process is not None and os.getsid(process.pid) == self.process.pid
                its = its or process.environ().get(MARK) == str(self.folder)
                if its and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def made(self) -> dict[str, int]:
        """Finished runs, compressions and trainings, each with what no second making could give it: its inode."""
        found = {}
        for folder in (self.outputs / "runs", self.cache / "compressions", self.cache / "adapters"):
            with suppress(FileNotFoundError):
                for path in folder.iterdir():
                    if path.is_dir() and not path.name.startswith("."):
                        found[f"{folder.name}/{path.name}"] = path.stat().st_ino
        return found

    def runs(self) -> int:
        """How many runs are finished."""
        return sum(name.startswith("runs/") for name in self.made())

    def results(self) -> dict[str, Any]:
        """What the runs found: every metric and every answer, by run."""
        return {
            path.name: [
                json.loads((path / "metrics.json").read_text()),
                pl.read_parquet(path / "items.parquet").to_dicts(),
            ]
            for path in sorted((self.outputs / "runs").iterdir())
        }

    def trainings(self) -> set[tuple[Path, int]]:
        """The kept states of trainings that have not ended, with the time of each."""
        found = set()
        for path in self.cache.glob("adapters/.*.checkpoint"):
            with suppress(FileNotFoundError):
                found.add((path, path.stat().st_mtime_ns))
        return found

    def keepings(self) -> set[Path]:
        """The folders of compressions that are being made to be kept."""
        return {path for path in self.cache.glob("compressions/.*") if path.is_dir()}


@dataclass
class Counts:
    """What the kills cost."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # a status that is not the signal's, a start that failed, a hang

    @property
    def are_zero(self) -> bool:
        """Whether nothing was lost, done twice, left behind or wrong."""
        return not (self.lost or self.twice or self.orphans or self.wrong)

    @property
    def sums(self) -> str:
        """How many of each kind, in words."""
        return (
            f"lost {len(self.lost)}, done twice {len(self.twice)}, orphans {len(self.orphans)}, "
            f"wrong statuses and hangs {len(self.wrong)}"
        )

    def show(self) -> None:
        """Print a line for each kind of kill, whatever went wrong, and the sums."""
        for (launcher, moment), number in sorted(self.kills.items()):
            print(f"{launcher:<6} {moment:<28} {number:>3} kills")
        for name, found in (("lost", self.lost), ("done twice", self.twice), ("orphan", self.orphans)):
            print("".join(f"{name}: {what}\n" for what in found), end="")
        print("".join(f"wrong: {what}\n" for what in self.wrong), end="")
        print(f"kills {self.kills.total()}, {self.sums}")


Moment = Callable[["Sweep"], Callable[[], bool]]


def moments(draw: random.Random, seconds: float) -> dict[str, Moment]:
    """The kinds of moments; each gives, for a sweep about to be started, what tells that its moment has come."""

    def at_any(sweep: Sweep) -> Callable[[], bool]:
        end = time.monotonic() + draw.uniform(0, seconds)
        return lambda: time.monotonic() >= end

    def while_training(sweep: Sweep) -> Callable[[], bool]:
        before = sweep.trainings()
        return lambda: bool(sweep.trainings() - before)

    def while_keeping(sweep: Sweep) -> Callable[[], bool]:
        before = sweep.keepings()
        return lambda: bool(sweep.keepings() - before)

    def in_the_third_run(sweep: Sweep) -> Callable[[], bool]:
        came: list[float] = []

        def due() -> bool:
            if not came and sweep.runs() >= 2:
                came.append(time.monotonic() + draw.uniform(0, seconds / RUNS))
            return bool(came) and time.monotonic() >= came[0]

        return due

    return {
        "at any moment": at_any,
        "while it trains": while_training,
        "while a compression is kept": while_keeping,
        "in the middle of its third run": in_the_third_run,
    }


def undisturbed(sweep: Sweep) -> tuple[dict[str, Any], float]:
    """The results of a sweep that nobody kills, and the seconds that it takes."""
    sweep.start()
    begin = time.monotonic()  # not before: what is started with the libraries loaded may have waited for them
    assert sweep.process is not None
    status = sweep.process.wait(PATIENCE)
    assert status == 0, f"the sweep ends with status {status} although nobody kills it: see {sweep.folder / 'log'}"
    assert sweep.runs() == RUNS
    return sweep.results(), time.monotonic() - begin


def kill_sweeps(
    sweep_of: Callable[[int], Sweep],
    kills: int,
    draw: random.Random,
    kinds: dict[str, Moment],
    expected: dict[str, Any],
    counts: Counts,
) -> None:
    """Kill sweeps of one launcher so often, some of them twice; each is brought to its end afterwards.

    Args:
        sweep_of: gives the sweep of a number.
        kills: how often.
        draw: where chance comes from.
        kinds: the kinds of moments.
        expected: results of a sweep that nobody disturbs.
        counts: what is counted goes here.
    """
    chosen, killed, number = Counter[str](), 0, 0
    while killed < kills:
        number += 1
        sweep, made = sweep_of(number), dict[str, int]()
        for _ in range(min(2, kills - killed)):
            kind = min(kinds, key=lambda name: chosen[name])
            chosen[kind] += 1
            how = list(STATUS)[killed % len(STATUS)]
            if not kill_once(sweep, kinds[kind], how, draw, counts):
                break
            killed += 1
            counts.kills[sweep.launcher, kind] += 1
            print(f"{sweep.launcher}: {how.name} {kind}, {sweep.runs()} runs were finished", flush=True)
            made = check_kept(sweep, made, counts)
        finish(sweep, made, expected, counts)
        print(f"after {counts.kills.total()} kills: {counts.sums}", flush=True)


def kill_once(
    sweep: Sweep,
    moment: Moment,
    how: signal.Signals,
    draw: random.Random,
    counts: Counts,
) -> bool:
    """Start the sweep and kill it at its moment; False where it was over first, which is no kill."""
    due = moment(sweep)
    sweep.start()
    process = sweep.process
    assert process is not None
    end = time.monotonic() + PATIENCE
    while not due():
        if process.poll() is not None:
            return False
        if time.monotonic() > end:
            counts.wrong.append(f"{sweep.folder}: the sweep hangs")
            break
        time.sleep(0.002)
    whole = sweep.runs() == RUNS  # then the command may be about to end, and with status 0
    jobs = [one for one in sweep.processes() if is_slurms(one)] if how == signal.SIGKILL else []
    if jobs:
        with suppress(psutil.NoSuchProcess):
            draw.choice(jobs).kill()
    else:
        process.send_signal(how)
    try:
        status = process.wait(PATIENCE if jobs else 60)
    except subprocess.TimeoutExpired:
        counts.wrong.append(f"{sweep.folder}: goes on after {how.name}")
        process.kill()
        process.wait()
    else:
        if status == 0 and whole and not jobs:
            return False
        # In the first moments, before any of our code runs, Python itself ends by the signal.
        if status not in ((0, 1) if jobs else (STATUS[how], -how)):
            counts.wrong.append(f"{sweep.folder}: status {status} after {how.name}")
    count_orphans(sweep, [one for one in sweep.processes() if not is_slurms(one)], 2, counts)
    return True


def count_orphans(sweep: Sweep, processes: Sequence[psutil.Process], seconds: float, counts: Counts) -> None:
    """Count and end a sweep's processes that still run after some seconds, too few for one that goes on to be done."""
    for one in psutil.wait_procs(processes, timeout=seconds)[1]:
        with suppress(psutil.Error):
            counts.orphans.append(f"{sweep.folder}: {' '.join(one.cmdline())[:100]}")
            one.kill()


def is_slurms(process: psutil.Process) -> bool:
    """Whether a process is part of a job that SLURM still has."""
    try:
        job = process.environ().get("SLURM_JOB_ID")
    except psutil.Error:
        return False
    known = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, check=False) if job else None
    return known is not None and bool(known.stdout.strip())


def check_kept(sweep: Sweep, before: dict[str, int], counts: Counts) -> dict[str, int]:
    """Compare what is there with what was there before; gives what is there."""
    now = sweep.made()
    for name, inode in before.items():
        if name not in now:
            counts.lost.append(f"{sweep.folder}: {name}")
        elif now[name] != inode:
            counts.twice.append(f"{sweep.folder}: {name}")
    return now


def finish(sweep: Sweep, made: dict[str, int], expected: dict[str, Any], counts: Counts) -> None:
    """Let the sweep come to its end, and compare all that it found with what nobody disturbed."""
    sweep.start()
    assert sweep.process is not None
    try:
        status = sweep.process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        counts.wrong.append(f"{sweep.folder}: hangs when it is started again")
        end_all_in(sweep.folder)
        return
    end = time.monotonic() + PATIENCE
    while any(map(is_slurms, sweep.processes())) and time.monotonic() < end:
        time.sleep(0.5)
    count_orphans(sweep, sweep.processes(), 10, counts)
    if status != 0:
        counts.wrong.append(f"{sweep.folder}: status {status} when it is started again")
    check_kept(sweep, made, counts)
    found = sweep.results()
    counts.lost += [f"{sweep.folder}: the run {run}" for run, result in expected.items() if found.get(run) != result]
    left = [*sweep.outputs.glob("unfinished/*"), *sweep.outputs.glob("runs/.*")]
    counts.wrong += [f"{path} is left behind" for path in left]


@contextmanager
def single_node(folder: Path) -> Iterator[dict[str, str]]:
    """A SLURM of one node on this machine; gives what its commands need in the environment."""
    program = ROOT / "tests" / "slurm" / "single_node.sh"
    try:
        subprocess.run([program, "start", folder], check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)
        os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
        yield dict(os.environ)
    finally:
        subprocess.run([program, "stop", folder], check=False, timeout=60)


def end_all_in(folder: Path) -> None:
    """End what still runs for sweeps of a folder, so that nothing outlives this program when it is stopped."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK, "").startswith(str(folder)):
                process.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, count, print; 0 where nothing was lost, done twice, left behind or wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills over all launchers together")
    parser.add_argument("--launchers", default=",".join(LAUNCHERS), help="which, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--moment", default="", help="only moments whose names begin so, e.g. 'while it trains'")
    loaded = "commands begin with the heavy libraries loaded: seconds less each, and no kill comes while they load"
    parser.add_argument("--loaded", action="store_true", help=loaded)
    given = parser.parse_args(arguments)
    launchers, counts, draw = given.launchers.split(","), Counts(), random.Random(given.seed)
    if unknown := set(launchers) - set(LAUNCHERS):
        parser.error(f"--launchers={','.join(unknown)} does not exist; choose of {','.join(LAUNCHERS)}")
    with stoppable(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-")))
        stack.callback(end_all_in, folder)
        begin = commands.start if given.loaded else commands.start_anew
        expected, seconds = undisturbed(Sweep(folder / "undisturbed", "basic", dict(os.environ), begin))
        kinds = {name: of for name, of in moments(draw, seconds).items() if name.startswith(given.moment)}
        for i, launcher in enumerate(launchers):
            share = given.kills * (i + 1) // len(launchers) - given.kills * i // len(launchers)
            slurms = launcher == "slurm"
            environment = stack.enter_context(single_node(folder / "slurm-itself")) if slurms else dict(os.environ)

            def sweep_of(number: int, launcher: str = launcher, found: dict[str, str] = environment) -> Sweep:
                return Sweep(folder / f"{launcher}-{number}", launcher, found, begin)

            kill_sweeps(sweep_of, share, draw, kinds, expected, counts)
        counts.show()
        if not counts.are_zero:
            kept = Path(tempfile.mkdtemp(prefix="kills-kept-"))
            shutil.copytree(folder, kept, dirs_exist_ok=True, ignore_dangling_symlinks=True)
            print(f"all folders are kept in {kept}")
    return 0 if counts.are_zero else 1


if __name__ == "__main__":
    raise SystemExit(main())
