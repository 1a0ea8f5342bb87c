"""The command line: one run, or with ``-m`` a sweep; bad input is one line and exit status 2."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from knowledge_compression.building import nearest
from knowledge_compression.cache import check_cache
from knowledge_compression.configuration import GROUPS, Values, conf_folder, settings_of, values_of
from knowledge_compression.errors import BadInput
from knowledge_compression.sweeping.plan import BAD_INPUT, DONE, FAILED, Outcome, planned_names, settings_typed
from knowledge_compression.threads import let_idle_threads_sleep
from knowledge_compression.writing import no_room

if TYPE_CHECKING:
    from knowledge_compression.experiment import Experiment
    from knowledge_compression.results.store import Run
    from knowledge_compression.results.tracker import Tracker

log = logging.getLogger(__name__)

CONF = conf_folder()
SETTINGS = {*GROUPS, "tracker", *Values.__dataclass_fields__}

EXIT_STATUS = {DONE: 0, FAILED: 1, BAD_INPUT: 2}


def main() -> None:
    """Entry point of ``run.py``."""
    let_idle_threads_sleep()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors arrive unchanged; what the user sees is decided here
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it logs the building of its font list
    logging.raiseExceptions = False  # a line that a full disk does not take would be a stack trace on the terminal
    command = hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)
    try:
        check_choices(sys.argv[1:])
        sys.argv[1:] = settled_by_classes(sys.argv[1:])
        check_own_files(sys.argv[1:])
        try:
            command()
        except _ManyRuns:
            sys.argv.insert(1, "-m")
            command()
    except (BadInput, HydraException, OmegaConfBaseException, PermissionError) as error:
        refuse(error)


def check_own_files(arguments: Sequence[str]) -> None:
    """Refuse a user's own YAML files that cannot be read, which Hydra would not name.

    Raises:
        BadInput: a file of ``--config-dir`` cannot be read; the message names it and the problem.
    """
    joined = " ".join(arguments)
    for folder in re.findall(r"(?:^|\s)(?:--config-dir|-cd|--config-path|-cp)[=\s](\S+)", joined):
        for path in sorted(Path(folder).rglob("*.yaml")):
            try:
                content = OmegaConf.load(path)
            except Exception as error:  # many kinds of errors mean invalid YAML
                raise BadInput(f"{path} is not readable YAML ({one_line(error)})") from None
            if not isinstance(content, DictConfig):
                raise BadInput(f"{path} names no settings; each line of such a file is NAME: VALUE")


def check_choices(arguments: Sequence[str]) -> None:
    """Refuse what Hydra answers with a stack trace, with lines about its own options, or misreads as a name.

    Raises:
        BadInput: a group's value is not a file name, or a setting is not written ``NAME=VALUE``; the message names it.
    """
    for before, argument in pairwise(["", *arguments]):
        name = argument.lstrip("-").partition("=")[0]
        if argument.startswith("--") and name.partition(".")[0] in SETTINGS and name != "run":  # --run is Hydra's
            raise BadInput(f"{argument} is not an option; write settings as {name}=VALUE, without dashes")
        if argument in SETTINGS and not before.startswith("-"):
            raise BadInput(f"{argument} has no value; write {argument}=VALUE, without spaces")
        group, equals, choice = argument.partition("=")
        if equals and group in (*GROUPS, "tracker"):
            listed = choice.startswith("[") and group != "eval"
            if listed or choice.strip("'\"") in ("", "null", "~"):
                raise BadInput(f"{argument} does not choose a file; give a name of conf/{group}, see --help")


def settled_by_classes(arguments: Sequence[str]) -> list[str]:
    """Make Hydra accept settings inside a part, e.g. ``recovery.rank=8``, whether or not a file lists them.

    Whether they exist is decided by the class, see :func:`~knowledge_compression.building.build`; a file chosen by a
    sweep may list settings that the default file does not. Options of ``sbatch`` are left to it.
    """
    inside = re.compile(rf"(({'|'.join(GROUPS)}|tracker)\.[^=]+|hydra\.launcher\.options(\.[^=]+)?)=")
    return [f"++{argument}" if inside.match(argument) else argument for argument in arguments]


class _ManyRuns(BaseException):
    """A preset sweeps without ``-m``; not an Exception, which Hydra would report to the user."""


def job(config: DictConfig) -> Outcome | None:
    """Hydra's task function: a single run, or one job of a sweep, whose outcome the sweeper collects."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return attempt(config)
    sweeper = HydraConfig.get().sweeper
    if not isinstance(sweeper, DictConfig):
        refuse(BadInput(f"hydra.sweeper={sweeper} is not a sweeper of this project; use hydra/sweeper=planned"))
    if sweeper.get("params") or sweeper.get("grids"):
        raise _ManyRuns
    from knowledge_compression.results.layout import Layout
    from knowledge_compression.results.summary import show

    try:
        if values_of(settings_of(config)).run.plan:
            plan(config)
            return None
        run, baseline = carry_out(config)
    except BadInput as error:
        refuse(error)
    show([run], {run.id: baseline})
    log.info("items, metrics and reports: %s", Layout(Path(config.output.dir)).runs / run.id)
    return None


def plan(config: DictConfig) -> None:
    """Print what one run would do and cost."""
    from knowledge_compression.configuration import experiment_from
    from knowledge_compression.results.store import RunStore
    from knowledge_compression.sweeping import forecast

    check_cache()
    experiment = experiment_from(config, HydraConfig.get().runtime.choices)
    store = RunStore(config.output.dir)
    if not experiment.is_done(store):
        experiment.check()
    found = forecast.Forecaster(store, config.run.rate).of(experiment, "the run")
    forecast.show(found, forecast.totals(found, at_once=1, gpus=0))


def refuse(error: BaseException) -> NoReturn:
    """Print one line about what was wrong with the input, and exit with status 2."""
    sys.stderr.write(f"error: {one_line(error)}\n")
    raise SystemExit(EXIT_STATUS[BAD_INPUT]) from None


def carry_out(config: DictConfig) -> tuple[Run, Run]:
    """Do the run and its dense baseline, or find them in the store.

    Raises:
        BadInput: the settings contradict one another.
    """
    # The parts are loaded here, so that --help and tab completion answer at once.
    from knowledge_compression.configuration import experiment_from, tracker_from
    from knowledge_compression.results.store import RunStore
    from knowledge_compression.results.tracker import NoTracker
    from knowledge_compression.sweeping.moved import say_what_moved

    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    check_cache()
    experiment = experiment_from(config, HydraConfig.get().runtime.choices)
    if in_sweep and HydraConfig.get().runtime.choices["hydra/launcher"] == "basic":  # all runs in this process
        experiment = replace(experiment, holds=True)
    store = RunStore(config.output.dir)
    # The baseline comes second, so jobs of a sweep that start together do not all wait for it; it comes first if it
    # records the states that they compare with. Without suites there is nothing to compare.
    wanted = [experiment] if experiment.is_dense or not experiment.suites else [experiment, experiment.dense()]
    tracker: Tracker = NoTracker()
    if config.run.force or not all(one.is_done(store) for one in wanted):
        if not in_sweep:  # in a sweep, the sweeper says it
            say_what_moved([experiment], store)
        sweep = Path(HydraConfig.get().sweep.dir) if in_sweep else None
        typed = HydraConfig.get().overrides.task
        names = planned_names(sweep) if sweep else {experiment.id: _called(experiment, typed)}
        tracker = tracker_from(config, sweep.name if sweep else None, names)
    with writing(config.output.dir):
        first = wanted[::-1] if experiment.compares else wanted
        done = {one.id: one.run(store, tracker, force=config.run.force and one is experiment) for one in first}
        return done[experiment.id], done[wanted[-1].id]


@contextmanager
def writing(folder: str) -> Iterator[None]:
    """Turn the errors of a disk that cannot be written into one line.

    Args:
        folder: the folder that is named if the error names no file.

    Raises:
        BadInput: it cannot be written; the message says why.
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # each library has errors of its own
        denied = error.strerror if isinstance(error, PermissionError) else None
        if (why := no_room(error) or denied) is None:
            raise
        raise BadInput(f"{getattr(error, 'filename', None) or folder} cannot be written ({why})") from None


def _called(experiment: Experiment, overrides: Sequence[str]) -> str:
    """What a tracker calls a run by itself: the files it chose, and the settings that were typed."""
    from knowledge_compression.results.varying import called

    return " ".join([called(experiment.choices), *settings_typed(overrides)])


def attempt(config: DictConfig) -> Outcome:
    """Do one job of a sweep, retrying as ``run.retries`` allows; its outcome is stored in its folder."""
    for left in range(config.run.retries, -1, -1):
        outcome = _attempt(config)
        if outcome.status != FAILED:
            break
        log.error("%s%s", outcome.line, "; retrying" if left else "")
    outcome.write(Path(HydraConfig.get().runtime.output_dir))
    return outcome


def _attempt(config: DictConfig) -> Outcome:
    """Any error in a job becomes part of its outcome."""
    job_config = HydraConfig.get()
    label = " ".join(override for override in job_config.overrides.task if not override.startswith("hydra"))
    start = time.perf_counter()
    try:
        run, baseline = carry_out(config)
    except BadInput as error:
        return Outcome(label, BAD_INPUT, message=one_line(error))
    except Exception as error:
        log.exception("the run failed")
        where = Path(job_config.runtime.output_dir) / f"{job_config.job.name}.log"
        return Outcome(label, FAILED, message=f"{type(error).__name__}: {one_line(error)}", log=str(where))
    return Outcome(label, DONE, run.id, baseline.id, seconds=time.perf_counter() - start)


def one_line(error: BaseException) -> str:
    """An error's message on one line, with what would be accepted if that is known."""
    message = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        names = {path.stem for path in (CONF / group).glob("*.yaml")} | {*(error.options or ())}  # and the reader's own
        there = sorted(name for name in names if not name.startswith("_"))
        return f"{group}={name} does not exist{nearest(name, there)}; choose one of {', '.join(there)}"
    if found := re.match(r"Could not override '([^']+)'", message):
        key = found[1]
        parent, _, name = key.rpartition(".")
        return f"there is no setting '{key}'" + nearest(name, _siblings(parent)) + "; python run.py --cfg job shows all"
    if isinstance(error, OverrideParseException) and error.override.count("=") > 1:
        key, _, value = error.override.partition("=")
        return f"""{error.override}: a value with = in it is quoted, e.g. '{key}="{value}"'"""
    cause = error.__cause__
    if isinstance(cause, BadInput):  # raised by a launcher that Hydra builds
        return one_line(cause)
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        message += f" ({' '.join(str(cause).split())})"
    return message or type(error).__name__


def _siblings(parent: str) -> list[str]:
    """Settings that a misspelt one could mean: top-level values and groups."""
    if parent:
        return []  # a part's settings depend on the file chosen for it
    return [str(key) for key in OmegaConf.load(CONF / "config.yaml") if key != "defaults"] + [
        folder.name for folder in CONF.iterdir() if folder.is_dir()
    ]
