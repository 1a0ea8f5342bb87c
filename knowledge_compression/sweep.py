"""The sweeper: every combination is checked before the first one starts, and all are shown together at the end."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from knowledge_compression.cli import BAD_INPUT, DONE, EXIT_STATUS, FAILED, Outcome, one_line
from knowledge_compression.errors import BadInput

log = logging.getLogger(__name__)


class PlannedSweeper(Sweeper):
    """The product of all choices: checked first, launched by whichever launcher was chosen, summed up at the end."""

    def __init__(self, params: Mapping[str, str] | None = None) -> None:
        """Hydra makes it from its configuration and calls ``setup``.

        Args:
            params: what a preset sweeps over, as on the command line, which wins where both name a key.
        """
        self.params = dict(params or {})
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
        """Check, launch, show; ends the process with the status that tells how it went."""
        assert self.config is not None and self.launcher is not None
        swept = [f"{key}={values}" for key, values in self.params.items()]
        jobs = combinations(OverridesParser.create().parse_overrides([*swept, *arguments]))
        refused = [outcome for overrides in jobs if (outcome := self._refusal(overrides))]
        for outcome in refused:
            sys.stderr.write(f"error: {outcome.label}: {outcome.message}\n")
        bad = {outcome.label for outcome in refused}
        good = [overrides for overrides in jobs if " ".join(overrides) not in bad]
        if refused and good:
            sys.stderr.write(f"running the other {len(good)} of {len(jobs)} combinations\n")
        outcomes = [*refused, *self._launch(good)] if good else refused
        raise SystemExit(max((EXIT_STATUS[outcome.status] for outcome in outcomes), default=0))

    def _refusal(self, overrides: Sequence[str]) -> Outcome | None:
        """Why this combination cannot run, found without loading a model."""
        from knowledge_compression.configuration import experiment_from

        assert self.config is not None and self.hydra_context is not None
        try:
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            experiment_from(config, config.hydra.runtime.choices).check()
        except (BadInput, HydraException) as error:
            return Outcome(" ".join(overrides), BAD_INPUT, message=one_line(error))
        return None

    def _launch(self, jobs: Sequence[Sequence[str]]) -> list[Outcome]:
        assert self.config is not None and self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        returns = self.launcher.launch(jobs, initial_job_idx=0)
        outcomes: list[Outcome] = [returned.return_value for returned in returns]
        for outcome in outcomes:
            if outcome.status != DONE:
                place = f" (log: {outcome.log})" if outcome.log else ""
                sys.stderr.write(f"{outcome.status}: {outcome.label}: {outcome.message}{place}\n")
        self._show(outcomes, folder)
        return outcomes

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
        failed = sum(outcome.status == FAILED for outcome in outcomes)
        log.info("%d runs done, %d failed", len(done), failed)


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """The product of all swept overrides, in the order they were typed, last one fastest.

    Raises:
        BadInput: a sweep over a continuous range, which has no list of values.
    """
    axes: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            axes[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise BadInput(f"{override.input_line} sweeps over a continuous range; give a list, e.g. {key}=0.2,0.4")
    return [list(job) for job in itertools.product(*axes.values())]
