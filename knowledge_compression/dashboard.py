"""The W&B workspace and report for a sweep: kc dashboard outputs/.

They compare the runs that tracker=wandb logged (or that wandb sync uploaded later): the columns of the table at
the end of a sweep, against the settings that vary. --json prints the definition without contacting a server.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as reports
from wandb_workspaces import workspaces

from knowledge_compression.errors import BadInput
from knowledge_compression.results.store import Run, RunStore
from knowledge_compression.results.summary import HEADLINES
from knowledge_compression.results.wandb_tracker import WandbTracker, flat
from knowledge_compression.sweeping.plan import PLAN, read_plan

_REACHED = ("compression/sparsity", "compression/bits", "compression/stored_bytes")
_CHOSEN = ("model", "target", "compression", "recovery")


@dataclass(frozen=True)
class Compared:
    """The content of a dashboard.

    Attributes:
        sweep: the runs' group on W&B.
        headlines: metrics to compare, by their names on W&B, e.g. ``atlas/accuracy``.
        varied: settings in which the runs differ, by their names on W&B, e.g. ``compression_sparsity``.
        parts: metrics of the parts of a suite, e.g. ``atlas/capital.accuracy``, by suite.
        skipped: runs that cannot be read, with reasons.
    """

    sweep: str
    headlines: Sequence[str]
    varied: Sequence[str]
    parts: dict[str, list[str]]
    skipped: Sequence[tuple[str, str]] = ()


def compared(outputs: Path, sweep: str | None = None) -> Compared:
    """The metrics and settings of a sweep that can be compared.

    Args:
        outputs: the folder that ``output.dir`` named.
        sweep: name of a folder under ``sweeps``; None takes the latest.

    Raises:
        BadInput: there is no such sweep, or none of its runs is finished.
    """
    there = sorted(plan.parent.name for plan in outputs.glob(f"sweeps/*/{PLAN}"))
    if not there or (sweep is not None and sweep not in there):
        raise BadInput(f"{outputs} has no sweep {sweep or 'at all'}; there are: {', '.join(there) or 'none'}")
    name = sweep or there[-1]
    store = RunStore(outputs)
    planned, _ = read_plan(outputs / "sweeps" / name)
    ids = dict.fromkeys(run_id for run in planned for run_id in (run.run_id, run.baseline_id))
    found = {run_id: store.look_up(run_id) for run_id in ids}
    runs = [run for run in found.values() if isinstance(run, Run)]
    skipped = [(run_id, why) for run_id, why in found.items() if isinstance(why, str)]
    if not runs:
        damaged = f" that can be read ({skipped[0][0]}: {skipped[0][1]})" if skipped else ""
        raise BadInput(f"no run of the sweep {name} is finished{damaged}; kc status shows more")
    return Compared(name, _headlines(runs), _varied(runs), _parts(runs), skipped)


def _shown(metric: str) -> str:
    """A metric's name in the tracker."""
    return metric.replace(".", "/")


def _headlines(runs: Sequence[Run]) -> list[str]:
    asked = dict.fromkeys(suite for run in runs for suite in run.config["eval"])
    known = {name for run in runs for name in run.metrics}
    return [_shown(f"{suite}.{metric}") for suite in asked for metric in HEADLINES if f"{suite}.{metric}" in known]


def _parts(runs: Sequence[Run]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted({name for run in runs for name in run.metrics}):
        suite, _, rest = name.partition(".")
        if rest.count(".") == 1 and rest.endswith(".accuracy"):
            found.setdefault(suite, []).append(_shown(name))
    return found


def _varied(runs: Sequence[Run]) -> list[str]:
    """Settings in which compressed runs differ, choices first."""
    configs = [flat(run.config) for run in runs if run.config["choices"]["compression"] != "none"]
    keys = dict.fromkeys([*_CHOSEN, *(key for config in configs for key in config)])
    return [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]


def _panels(what: Compared) -> dict[str, list[Any]]:
    """Panels by section name."""
    columns: list[Any] = [
        *(reports.Config(key) for key in what.varied),
        *(reports.SummaryMetric(key) for key in what.headlines),
    ]
    against = [
        reports.ScatterPlot(title=f"{metric} against {reached}", x=reports.SummaryMetric(reached), y=metric_of(metric))
        for metric in what.headlines
        for reached in _REACHED
    ]
    bars = [reports.BarPlot(title=metric, metrics=[metric_of(metric)], orientation="h") for metric in what.headlines]
    by_choice = [
        reports.BarPlot(title=f"{metric} by {key}", metrics=[metric_of(metric)], groupby=reports.Config(key))
        for metric in what.headlines
        for key in what.varied
        if key in _CHOSEN
    ]
    all_at_once = reports.ParallelCoordinatesPlot(
        title="settings and results",
        columns=[reports.ParallelCoordinatesPlotColumn(metric=column) for column in columns],
    )
    sections: dict[str, list[Any]] = {"Sweep": [all_at_once, *bars], "Compression": [*against, *by_choice]}
    for suite, metrics in what.parts.items():
        plots = [reports.BarPlot(title=metric, metrics=[metric_of(metric)], orientation="h") for metric in metrics]
        sections[suite] = [*plots, reports.MediaBrowser(media_keys=[f"figures/{suite}"])]
    return sections | {"Settings": [reports.RunComparer(diff_only="split")]}


def metric_of(name: str) -> Any:
    """A summary metric of a run."""
    return reports.SummaryMetric(name)


def workspace(what: Compared, entity: str, project: str) -> workspaces.Workspace:
    """The saved view of the project's runs, filtered to this sweep."""
    sections = [
        workspaces.Section(name=name, panels=panels, is_open=number < 2)
        for number, (name, panels) in enumerate(_panels(what).items())
    ]
    pinned = [*(f"config:{key}.value" for key in what.varied), *(f"summary:{key}" for key in what.headlines)]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"sweep {what.sweep}",
        sections=sections,
        runset_settings=workspaces.RunsetSettings(
            filters=[workspaces.Metric("Group") == what.sweep], pinned_columns=["run:displayName", *pinned]
        ),
    )


def report(what: Compared, entity: str, project: str) -> reports.Report:
    """The report to show to others, about the same runs."""
    runs = reports.Runset(entity=entity, project=project, name=what.sweep, filters=f"Group == '{what.sweep}'")
    blocks: list[Any] = [
        reports.P(f"The runs of the sweep {what.sweep} and the dense runs that they are compared with."),
        reports.TableOfContents(),
    ]
    for name, panels in _panels(what).items():
        blocks += [reports.H1(name), reports.PanelGrid(runsets=[runs], panels=panels)]
    return reports.Report(
        entity=entity, project=project, title=f"What compression did: sweep {what.sweep}", blocks=blocks, width="fluid"
    )


def definition(what: Compared, entity: str, project: str) -> dict[str, Any]:
    """The data that would be sent to the server, except the server's number for the project."""
    page = report(what, entity, project)
    for grid in page.blocks:
        for runs in getattr(grid, "runsets", []):
            runs.entity = ""  # otherwise the server is asked for that number
    made = {"workspace": workspace(what, entity, project), "report": page}
    return {
        name: json.loads(one._to_model().model_dump_json(by_alias=True, exclude_none=True))  # type: ignore[attr-defined]
        for name, one in made.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Build both and print their addresses, or their definitions."""
    parser = argparse.ArgumentParser(prog="kc dashboard", description=__doc__)
    parser.add_argument(
        "outputs", type=Path, nargs="?", default=Path("outputs"), help="the folder of runs and sweeps (outputs)"
    )
    parser.add_argument("--sweep", help="a folder under outputs/sweeps (default: the latest)")
    parser.add_argument("--project", default=WandbTracker.project, help="the W&B project (%(default)s)")
    parser.add_argument("--entity", help="the W&B user or team (the one logged in)")
    parser.add_argument("--json", action="store_true", help="print the definition without contacting a server")
    options = parser.parse_args(arguments)
    try:
        what = compared(options.outputs, options.sweep)
        sys.stderr.writelines(f"left out – {run_id}: {why}\n" for run_id, why in what.skipped)
        if options.json:
            told = definition(what, options.entity or "me", options.project)
            sys.stdout.write(json.dumps(told, indent=1, sort_keys=True) + "\n")
            return 0
        _save(what, options.entity or _logged_in(), options.project)
    except BadInput as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _save(what: Compared, entity: str, project: str) -> None:
    import wandb

    for one in (workspace(what, entity, project), report(what, entity, project)):
        try:
            one.save()
        except (wandb.errors.Error, OSError, ValueError) as error:
            raise BadInput(
                f"W&B refused the dashboard ({' '.join(str(error).split())[:200]}); --json prints it"
            ) from None
        sys.stdout.write(f"{one.url}\n")


def _logged_in() -> str:
    import wandb

    try:
        return str(wandb.Api(timeout=20).default_entity)
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise BadInput(
            f"W&B does not say who is logged in ({' '.join(str(error).split())[:160]}); run `wandb login`, give "
            "--entity, or --json to print the definition"
        ) from None


if __name__ == "__main__":
    raise SystemExit(main())
