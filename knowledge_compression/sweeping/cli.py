"""The command line: one run, or with ``-m`` a sweep; bad input is one line and exit status 2."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from knowledge_compression.cache import check_cache
from knowledge_compression.errors import BadInput
from knowledge_compression.sweeping.plan import BAD_INPUT, DONE, FAILED, Outcome

if TYPE_CHECKING:
    from knowledge_compression.results.store import Run

log = logging.getLogger(__name__)

CONF = Path(__file__).parents[2] / "conf"

EXIT_STATUS = {DONE: 0, FAILED: 1, BAD_INPUT: 2}
_NO_ROOM = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES}  # a disk that takes nothing, whoever writes


def main() -> None:
    """Entry point of ``run.py``."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us whole; what the user sees is decided here
    if {"-m", "--multirun"} & set(sys.argv):
        sys.argv[1:] = with_their_files(sys.argv[1:])
    try:
        check_own_files(sys.argv[1:])
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except (BadInput, HydraException, OmegaConfBaseException) as error:
        refuse(error)


def check_own_files(arguments: Sequence[str]) -> None:
    """Refuse YAML files of the user's own that cannot be read, which Hydra would meet without naming them.

    Raises:
        BadInput: names the file of ``--config-dir`` and what is wrong with it.
    """
    joined = " ".join(arguments)
    for folder in re.findall(r"(?:^|\s)(?:--config-dir|-cd|--config-path|-cp)[=\s](\S+)", joined):
        for path in sorted(Path(folder).rglob("*.yaml")):
            try:
                content = OmegaConf.load(path)
            except Exception as error:  # as many kinds as there are ways not to be YAML
                raise BadInput(f"{path} is not YAML that can be read ({one_line(error)})") from None
            if not isinstance(content, DictConfig):
                raise BadInput(f"{path} names no settings; each line of such a file is NAME: VALUE")


def with_their_files(arguments: Sequence[str]) -> list[str]:
    """Settings of a swept group, as in ``recovery=idp,concat recovery.prompts=[1,2]``, as sweeps of one value.

    Hydra looks for other settings in the files of the defaults, before any file of the sweep is chosen. A group may be
    swept on the command line or by a preset.
    """
    typed = [argument.partition("=")[::2] for argument in arguments if "=" in argument]
    swept = {key for key, value in typed if _sweeps(key, value)}
    swept.update(*(_swept_by(value) for key, value in typed if key.lstrip("+") == "experiment"))

    def together(argument: str) -> str:
        key, _, value = argument.partition("=")
        group, dot, _ = key.partition(".")
        waits = value and dot and group in swept and not _sweeps(key, value)
        return f"{key}={value},{value}" if waits else argument  # once is no sweep, and choice() takes no null

    return [together(argument) for argument in arguments]


def _swept_by(presets: str) -> set[str]:
    """What the presets of ``[a,b]`` or ``a,b`` sweep; Hydra names those that do not exist."""
    files = [CONF / "experiment" / f"{name}.yaml" for name in re.findall(r"[^\s,\[\]]+", presets)]
    return {
        str(key)
        for file in files
        if file.is_file()
        for key in OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params") or ()
    }


def _sweeps(key: str, value: str) -> bool:
    """Whether an override names several values; one that cannot be read is left to Hydra to refuse."""
    try:
        return OverridesParser.create().parse_override(f"{key}={value}").is_sweep_override()
    except HydraException:
        return False


def job(config: DictConfig) -> Outcome | None:
    """What Hydra calls: one run alone, or one job of a sweep, whose outcome the sweeper gathers."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return attempt(config)
    from knowledge_compression.results.summary import show

    try:
        if config.run.plan:
            plan(config)
            return None
        run, baseline = carry_out(config)
    except BadInput as error:
        refuse(error)
    show([run], {run.id: baseline})
    return None


def plan(config: DictConfig) -> None:
    """Print what one run would do and take."""
    from knowledge_compression.configuration import experiment_from
    from knowledge_compression.results.store import RunStore
    from knowledge_compression.sweeping import forecast

    check_cache()
    experiment = experiment_from(config, HydraConfig.get().runtime.choices)
    experiment.check()
    found = forecast.Forecaster(RunStore(config.output.dir), config.run.rate).of(experiment, "the run")
    forecast.show(found, forecast.totals(found, at_once=1, gpus=0))


def refuse(error: BaseException) -> NoReturn:
    """Say in one line what was wrong with the input, and end with status 2."""
    sys.stderr.write(f"error: {one_line(error)}\n")
    raise SystemExit(EXIT_STATUS[BAD_INPUT]) from None


def carry_out(config: DictConfig) -> tuple[Run, Run]:
    """Do the run and the dense baseline it is compared with, or find them; both come back whole.

    Raises:
        BadInput: what was asked for does not fit together.
    """
    # Torch and transformers are loaded here, so that --help and tab completion answer at once.
    from knowledge_compression.configuration import experiment_from, tracker_from
    from knowledge_compression.models.held import HeldSource
    from knowledge_compression.results.store import RunStore

    in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    check_cache()
    experiment = experiment_from(config, HydraConfig.get().runtime.choices)
    if in_sweep and HydraConfig.get().runtime.choices["hydra/launcher"] == "basic":  # all runs in this process
        experiment = replace(experiment, source=HeldSource(experiment.source))
    experiment.check()
    tracker = tracker_from(config, Path(HydraConfig.get().sweep.dir).name if in_sweep else None)
    store = RunStore(config.output.dir)
    try:
        # The baseline comes second: the jobs of a sweep that start together do not all wait for the one that makes it.
        run = experiment.run(store, tracker, force=config.run.force)
        alone = experiment.is_dense or not experiment.suites  # where nothing is asked there is nothing to compare
        return run, run if alone else experiment.dense().run(store, tracker)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise BadInput(f"{error.filename or config.output.dir} cannot be written ({error.strerror})") from None


def attempt(config: DictConfig) -> Outcome:
    """Do one job of a sweep, again where it fails and ``run.retries`` allows; its outcome is kept in its folder."""
    for left in range(config.run.retries, -1, -1):
        outcome = _attempt(config)
        if outcome.status != FAILED:
            break
        log.error("%s%s", outcome.line, "; trying again" if left else "")
    outcome.write(Path(HydraConfig.get().runtime.output_dir))
    return outcome


def _attempt(config: DictConfig) -> Outcome:
    """Whatever goes wrong in a job stays in its outcome."""
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
    """What an error says, on one line, with what would be accepted where that is known."""
    message = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        there = sorted(path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))
        return f"{group}={name} does not exist{_nearest(name, there)}; choose one of {', '.join(there)}"
    if found := re.match(r"Could not override '([^']+)'", message):
        key = found[1]
        parent, _, name = key.rpartition(".")
        return (
            f"there is no setting '{key}'" + _nearest(name, _siblings(parent)) + "; python run.py --cfg job shows all"
        )
    cause = error.__cause__
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException):
        message += f" ({' '.join(str(cause).split())})"
    return message or type(error).__name__


def _siblings(parent: str) -> list[str]:
    """Settings that exist beside a misspelt one: top-level values and groups."""
    if parent:
        return []  # what a part accepts depends on the file that was chosen for it
    return [str(key) for key in OmegaConf.load(CONF / "config.yaml") if key != "defaults"] + [
        folder.name for folder in CONF.iterdir() if folder.is_dir()
    ]


def _nearest(name: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
