"""The sweeper: every combination is checked before the first one starts, and all are summarised at the end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from knowledge_compression.cache import check_cache
from knowledge_compression.configuration import Values, settings_of, values_of
from knowledge_compression.errors import BadInput
from knowledge_compression.progress import shown
from knowledge_compression.results.secrets import hidden
from knowledge_compression.sweeping.cli import EXIT_STATUS, one_line, settled_by_classes, writing
from knowledge_compression.sweeping.combinations import combinations, selected
from knowledge_compression.sweeping.launching import ProcessLauncher
from knowledge_compression.sweeping.plan import (
    BAD_INPUT,
    DONE,
    Outcome,
    PlannedRun,
    labels,
    withdraw_plan,
    write_plan,
)

if TYPE_CHECKING:
    from knowledge_compression.experiment import Experiment
    from knowledge_compression.sweeping.combinations import Composer
    from knowledge_compression.sweeping.parts import Parts

log = logging.getLogger(__name__)

_MANY = 200  # combinations above which a bar shows the checks

_SHOWN = 1000  # runs of a sweep with nothing to do; a table of more would take longer than everything else


class PlannedSweeper(Sweeper):
    """The product of all choices: checked first, launched by the chosen launcher, summarised at the end."""

    def __init__(
        self, params: Mapping[str, Any] | None = None, grids: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        """Hydra builds it from its configuration and calls ``setup``.

        Args:
            params: the keys that a preset sweeps, as on the command line, which takes precedence.
            grids: further keys; each grid is swept separately, together with ``params``.
        """
        self.params, self.grids = dict(params or {}), [dict(grid) for grid in grids or [{}]]
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Check, launch, summarise; ends the process with the sweep's exit status."""
        from knowledge_compression.results.store import RunStore
        from knowledge_compression.sweeping.combinations import Composer
        from knowledge_compression.sweeping.moved import say_what_moved
        from knowledge_compression.sweeping.parts import Parts

        assert self.config is not None and self.launcher is not None and self.hydra_context is not None
        check_cache()
        # Only what all jobs share is checked here: a part may still lack values that the sweep sets.
        shared = [name for name in Values.__dataclass_fields__ if name in self.config]
        values_of(settings_of(OmegaConf.masked_copy(self.config, shared)))
        jobs = self._jobs(arguments)
        composer = Composer(self.hydra_context.config_loader, self.config, jobs)
        parts = Parts()
        named = list(zip(jobs, labels(jobs), strict=True))
        shows = len(named) > _MANY  # fewer are checked in a moment
        checked = [self._check(composer, parts, *job) for job in (shown(named, "checking") if shows else named)]
        refused = [outcome for outcome in checked if isinstance(outcome, Outcome)]
        accepted = _distinct([one for one in checked if not isinstance(one, Outcome)])
        for outcome in refused:
            sys.stderr.write(f"error: {outcome.label}: {outcome.message}\n")
        if self.config.run.plan:
            self._forecast(accepted)
            raise SystemExit(EXIT_STATUS[BAD_INPUT] if refused else 0)
        planned = [run for run, _ in accepted]
        say_what_moved([one for run, one in accepted if not run.there], RunStore(self.config.output.dir))
        if refused and planned:
            sys.stderr.write(f"running the other {len(planned)} of {len(jobs)} combinations\n")
        with writing(self.config.output.dir):
            outcomes = [*refused, *self._launch(planned, self._names(accepted))] if planned else refused
        raise SystemExit(max((EXIT_STATUS[outcome.status] for outcome in outcomes), default=0))

    def _jobs(self, arguments: Sequence[str]) -> list[list[str]]:
        """Every combination of every grid, each once."""
        parser = OverridesParser.create()
        for number, grid in enumerate(self.grids):
            if both := sorted(grid.keys() & self.params.keys()):
                raise BadInput(f"hydra.sweeper: params and grids.{number} both sweep {both[0]}; name it in one of them")
        given = {override.key_or_group for override in parser.parse_overrides(list(arguments))}
        jobs: dict[tuple[str, ...], None] = {}
        for chosen, of_grid in selected(self.grids, parser.parse_overrides(list(arguments))):
            typed = parser.parse_overrides(of_grid)
            swept = {key: value for key, value in (self.params | dict(chosen)).items() if key not in given}
            parsed = parser.parse_overrides(
                settled_by_classes([f"{key}={_as_typed(value)}" for key, value in swept.items()])
            )
            jobs.update(dict.fromkeys(map(tuple, combinations([*parsed, *typed]))))
        return [list(job) for job in jobs]

    def _check(
        self, composer: Composer, parts: Parts, overrides: Sequence[str], label: str
    ) -> tuple[PlannedRun, Experiment] | Outcome:
        """The run of a combination, or why it is impossible, determined without loading a model."""
        from knowledge_compression.results.store import RunStore

        try:
            composed = composer(overrides)
            experiment = replace(parts.experiment(composed), holds=True)
            store, dense = RunStore(composed.settings["output"]["dir"]), experiment.dense()
            done = parts.is_done(experiment, store) and (not experiment.suites or parts.is_done(dense, store))
            there = done and not composed.settings["run"]["force"]
            if not there:
                parts.check(experiment)
            run = PlannedRun(list(overrides), experiment.id, dense.id, there)
        except (BadInput, HydraException) as error:
            return Outcome(label, BAD_INPUT, message=one_line(error))
        return run, experiment

    def _forecast(self, accepted: Sequence[tuple[PlannedRun, Experiment]]) -> None:
        """Print what the sweep would do and cost."""
        from knowledge_compression.results.store import RunStore
        from knowledge_compression.sweeping import forecast

        assert self.config is not None
        launcher, run = self.config.hydra.launcher, self.config.run
        apart = isinstance(self.launcher, ProcessLauncher)
        forecaster = forecast.Forecaster(
            RunStore(self.config.output.dir), run.rate, process_each=apart, holds=not apart
        )
        names = labels([planned.overrides for planned, _ in accepted])
        found = [
            one
            for (_, experiment), name in zip(accepted, names, strict=True)
            for one in forecaster.of(experiment, name)
        ]
        forecast.show(found, forecast.totals(found, launcher.get("at_once", 1), launcher.get("gpus", 0)))

    def _names(self, accepted: Sequence[tuple[PlannedRun, Experiment]]) -> dict[str, str]:
        """What a tracker calls the runs, by id: the settings that vary in this sweep. Empty if nothing is tracked."""
        from knowledge_compression.results.varying import Names

        assert self.config is not None
        if self.config.hydra.runtime.choices.tracker == "none" or all(run.there for run, _ in accepted):
            return {}
        found = [one for _, experiment in accepted for one in (experiment.dense(), experiment)]
        names = Names({experiment.id: experiment.settings for experiment in found})
        return {experiment.id: names.of(experiment.id) for experiment in found}

    def _launch(self, planned: Sequence[PlannedRun], called: Mapping[str, str]) -> list[Outcome]:
        """Do the missing runs."""
        assert self.config is not None and self.launcher is not None
        if isinstance(self.launcher, ProcessLauncher):
            self.launcher.check()
        elif self.config.run.detach:
            raise BadInput("run.detach=true needs hydra/launcher=slurm; here the sweep ends with this process")
        folder = Path(self.config.hydra.sweep.dir)
        missing = [run for run in planned if not run.there]
        if len(missing) < len(planned):
            log.info("%d of %d runs are already finished", len(planned) - len(missing), len(planned))
        planned = [*missing, *(run for run in planned if run.there)]  # job i of the launcher is run i of the plan
        names = labels([run.overrides for run in planned])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            told = hidden(OmegaConf.to_container(self.config, enum_to_str=True))
            (folder / "multirun.yaml").write_text(yaml.safe_dump(told, sort_keys=False, allow_unicode=True))
            write_plan(folder, planned, self.config.hydra.launcher.get("at_once", 1), called)
        except OSError as error:
            raise BadInput(f"output.dir={self.config.output.dir} cannot be written ({error.strerror})") from None
        if not missing and len(planned) > _SHOWN:
            log.info("kc report %s compares them", self.config.output.dir)
            return []
        self._name_held(missing, names)
        try:
            returns = self.launcher.launch([run.overrides for run in missing], initial_job_idx=0) if missing else []
        except BadInput:
            withdraw_plan(folder)
            raise
        if self.config.run.detach:
            log.info("the runs continue without this process; kc status shows their progress")
            return []
        outcomes = [
            replace(returned.return_value, label=label)
            for returned, label in zip(returns, names[: len(missing)], strict=True)
        ]
        outcomes += [
            Outcome(label, DONE, run.run_id, run.baseline_id)
            for run, label in zip(planned[len(missing) :], names[len(missing) :], strict=True)
        ]
        if troubled := [outcome for outcome in outcomes if outcome.status != DONE]:
            sys.stderr.write(f"{len(troubled)} of {len(outcomes)} runs failed:\n")
            sys.stderr.writelines(f"{outcome.line}\n" for outcome in troubled)
        self._show(outcomes, folder)
        return outcomes

    def _name_held(self, missing: Sequence[PlannedRun], names: Sequence[str]) -> None:
        """Report which runs other processes are making now: this sweep waits for their results."""
        from knowledge_compression.results.store import RunStore

        assert self.config is not None
        store = RunStore(self.config.output.dir)
        for run, name in zip(missing, names, strict=False):
            if (by := store.holder(run.run_id)) is not None:
                log.info("%s is making run %s; this sweep waits for it", by, name)

    def _show(self, outcomes: Sequence[Outcome], folder: Path) -> None:
        from knowledge_compression.results.store import RunStore
        from knowledge_compression.results.summary import show

        assert self.config is not None
        store = RunStore(self.config.output.dir)
        done = [outcome for outcome in outcomes if outcome.status == DONE]
        runs = [run for outcome in done if (run := store.find(outcome.run_id))]
        baselines = {o.run_id: baseline for o in done if (baseline := store.find(o.baseline_id))}
        if runs:
            show(runs, baselines, folder)
        log.info("%d runs done, %d failed", len(done), len(outcomes) - len(done))
        if runs:
            outputs = self.config.output.dir
            log.info("next: kc report %s -o report.html, or kc advise %s --keep 95%%", outputs, outputs)


def _distinct(accepted: Sequence[tuple[PlannedRun, Experiment]]) -> list[tuple[PlannedRun, Experiment]]:
    """Each run once: combinations that differ only in settings without effect, such as an unused seed, are one run."""
    first: dict[str, tuple[PlannedRun, Experiment]] = {}
    idle: set[str] = set()
    for run, experiment in accepted:
        known, _ = first.setdefault(run.run_id, (run, experiment))
        unlike = set(run.overrides) ^ set(known.overrides)
        idle |= {override.partition("=")[0].lstrip("+") for override in unlike}
    if len(first) < len(accepted):
        log.info(
            "%d combinations are %d runs: %s has no effect in some of them",
            len(accepted),
            len(first),
            ", ".join(sorted(idle)),
        )
    return list(first.values())


def _as_typed(value: Any) -> str:
    """A preset's sweep over a key, as it would be typed; a list is a list of values."""
    return ",".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)
