"""The progress of sweeps, run by run: kc status outputs/."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

from knowledge_compression.errors import BadInput
from knowledge_compression.results.layout import Layout
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.results.summary import shown
from knowledge_compression.sweeping.plan import BAD_INPUT, DONE, FAILED, PLAN, Outcome, labels, read_plan

RUNNING, MISSING, DAMAGED = "running", "missing", "damaged"


@dataclass(frozen=True)
class SweepStatus:
    """The progress of one sweep.

    Attributes:
        name: the name of its folder.
        states: the state of each run: ``done``, ``running``, ``failed``, ``bad input``, ``damaged`` or ``missing``.
        outcomes: the outcomes of jobs that ended without a result.
        seconds_left: estimated from the finished runs; None if there are none.
    """

    name: str
    states: Sequence[str]
    outcomes: Sequence[Outcome]
    seconds_left: float | None

    def count(self, state: str) -> int:
        """Number of runs in a state."""
        return sum(found == state for found in self.states)


def sweeps(outputs: Path) -> list[SweepStatus]:
    """Every sweep under an outputs folder, oldest first.

    Raises:
        BadInput: there is no such folder.
    """
    if not outputs.is_dir():
        raise BadInput(f"{outputs} does not exist; give the folder that output.dir named")
    alive, store = _living_jobs(), RunStore(outputs)
    look_up = cache(store.look_up)  # the same runs are in the sweep and in every later start of it
    return [_status(store, look_up, plan.parent, alive) for plan in Layout(outputs).sweeps_with(PLAN)]


def _status(
    store: RunStore, look_up: Callable[[str], Run | str | None], folder: Path, alive: set[str] | None
) -> SweepStatus:
    try:
        planned, at_once = read_plan(folder)
    except BadInput as error:
        return SweepStatus(folder.name, [DAMAGED], [Outcome("the sweep", DAMAGED, message=str(error))], None)
    names = labels([run.overrides for run in planned])
    states, troubled, seconds = [], [], []
    for number, (run, label) in enumerate(zip(planned, names, strict=True)):
        job = folder / str(number)
        try:
            outcome = Outcome.read(job)
        except BadInput as error:
            outcome = None
            troubled.append(Outcome(label, DAMAGED, message=str(error)))
        if outcome is not None and outcome.seconds:
            seconds.append(outcome.seconds)
        found = {run_id: look_up(run_id) for run_id in dict.fromkeys((run.run_id, run.baseline_id))}
        broken = [f"runs/{run_id}: {why}" for run_id, why in found.items() if isinstance(why, str)]
        if all(isinstance(one, Run) for one in found.values()):
            states.append(DONE)
            for one in found.values():
                if isinstance(one, Run) and one.void:
                    why = "; ".join(dict.fromkeys(one.void.values()))
                    troubled.append(Outcome(label, DONE, message=f"runs/{one.id}: {why}"))
        elif outcome is not None and outcome.status in (FAILED, BAD_INPUT):
            states.append(outcome.status)
            troubled.append(replace(outcome, label=label))  # as short as this sweep allows
        elif any(store.holder(run_id) for run_id in (run.run_id, run.baseline_id)):
            states.append(RUNNING)
        elif broken:
            states.append(DAMAGED)
            troubled.append(Outcome(label, DAMAGED, message=f"{broken[0]}; the next start of the sweep does it again"))
        elif (lost := _lost(job, label, alive)) is not None:
            states.append(FAILED)
            troubled.append(lost)
        else:
            states.append(MISSING)
    left = (
        states.count(RUNNING) * 0.5 + states.count(MISSING) + states.count(DAMAGED)
    )  # a running one is half done, on average
    each = sum(seconds) / len(seconds) if seconds else None
    seconds_left = 0.0 if not left else None if each is None else each * left / min(at_once, left)
    return SweepStatus(folder.name, states, troubled, seconds_left)


def _lost(job: Path, label: str, alive: set[str] | None) -> Outcome | None:
    """The outcome of a job submitted to SLURM, if SLURM no longer lists it."""
    if alive is None:
        return None
    from knowledge_compression.sweeping.slurm import HandedIn, how_it_ended

    handed_in = HandedIn.of(job)
    if handed_in is None or handed_in.job_id in alive:
        return None
    why = f"ended by SLURM without a result ({how_it_ended(handed_in.job_id)})"
    return Outcome(label, FAILED, message=why, log=handed_in.log)


def _living_jobs() -> set[str] | None:
    """The jobs that SLURM lists, if there is SLURM and it answers."""
    if shutil.which("squeue") is None:
        return None
    from knowledge_compression.sweeping.slurm import living_jobs

    try:
        return living_jobs()
    except BadInput:
        return None


def show(found: Sequence[SweepStatus], console: Console) -> None:
    """Print the table, and one line per run that ended without a result."""
    # Without edges, a row and its time left fit in 80 characters.
    table = Table(title="Sweeps", title_justify="left", show_edge=False, pad_edge=False)
    damaged = [DAMAGED] if any(sweep.count(DAMAGED) for sweep in found) else []
    for column in ("sweep", "runs", DONE, RUNNING, FAILED, MISSING, *damaged, "time left"):
        table.add_column(column, justify="left" if column == "sweep" else "right", no_wrap=column != "time left")
    for sweep in found:
        failed = sweep.count(FAILED) + sweep.count(BAD_INPUT)
        counts = [len(sweep.states), sweep.count(DONE), sweep.count(RUNNING), failed, sweep.count(MISSING)]
        counts += [sweep.count(state) for state in damaged]
        table.add_row(shown(sweep.name), *map(str, counts), _duration(sweep.seconds_left))
    console.print(table)
    for sweep in found:
        for outcome in sweep.outcomes:
            console.print(shown(f"{sweep.name}: {outcome.line}"), soft_wrap=True)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h" if hours else f"{minutes} min" if minutes else f"{rest} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the progress; the exit status tells whether a run failed."""
    parser = argparse.ArgumentParser(prog="kc status", description=__doc__)
    parser.add_argument(
        "outputs", type=Path, nargs="?", default=Path("outputs"), help="the folder of runs and sweeps (outputs)"
    )
    try:
        found = sweeps(parser.parse_args(arguments).outputs)
    except BadInput as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if not found:
        sys.stdout.write("no sweep was started with this folder; kc report compares its single runs\n")
        return 0
    show(found, Console())
    return 1 if any(outcome.status != DONE for sweep in found for outcome in sweep.outcomes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
