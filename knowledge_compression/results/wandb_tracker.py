"""Tracking on Weights & Biases, or on disk for ``wandb sync``; whatever happens to W&B, the run continues."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from knowledge_compression.errors import BadInput
from knowledge_compression.results.secrets import is_secret
from knowledge_compression.results.store import Run
from knowledge_compression.results.tracker import TrackedRun, Unseen
from knowledge_compression.results.varying import called

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from wandb import Run as WandbRun

log = logging.getLogger(__name__)

# W&B's reports of its own errors delay the process's end by 20 s if their server does not answer.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

_SPELT = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}

Mode = Literal["online", "offline"]


@dataclass(frozen=True)
class WandbTracker:
    """Weights & Biases.

    Attributes:
        project, entity: where the run is logged; by default the entity that is logged in.
        mode: ``online``, or ``offline``.
        group: the group of runs; by default, the command line uses the sweep's name.
        tags: added to the names of the chosen files.
        items: maximum number of rows in the table of items.
        artifact: whether the compressed model, if saved, is logged as an artifact of type ``model``.
        seconds: maximum time that the tracker may take from a run.
        dir: the folder that contains ``wandb/``.
        names: what runs are called, by id; the command line puts what varies in the sweep here. A run that is not in
            it is called by its chosen files.
    """

    project: str = "knowledge_compression"
    entity: str | None = None
    mode: Mode = "online"
    group: str | None = None
    tags: Sequence[str] = ()
    items: int = 10_000
    artifact: bool = False
    seconds: float = 30.0
    dir: str = "outputs"
    names: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an online tracker without a login; a prompt would stop an unattended sweep."""
        import wandb

        if self.mode not in get_args(Mode):
            raise BadInput(f"tracker.mode={self.mode} does not exist; choose one of {', '.join(get_args(Mode))}")
        if self.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise BadInput(
                "tracker=wandb finds no login; run `wandb login`, set WANDB_API_KEY, or choose tracker=wandb_offline"
            )

    @contextmanager
    def track(self, run_id: str, settings: Mapping[str, Any]) -> Iterator[TrackedRun]:
        """Start the run's page, or resume that of an interrupted run with the same hash; always close it.

        A run that raises is closed as failed (exit code 1).
        """
        tracked: _Tracked | Unseen = self._start(run_id, settings) or Unseen()
        try:
            yield tracked
        except BaseException:
            tracked.close(exit_code=1)
            raise
        tracked.close(exit_code=0)

    def _start(self, run_id: str, settings: Mapping[str, Any]) -> _Tracked | None:
        start = time.perf_counter()
        run = _within(self.seconds / 3, "starting", lambda: self._init(self.mode, run_id, settings))
        if run is None and self.mode == "online":
            left = 2 * self.seconds / 3 - (time.perf_counter() - start)
            run = _within(left, "going offline", lambda: self._init_again("offline", run_id, settings))
            if run is not None:
                log.warning("W&B does not answer; this run is kept in %s for `wandb sync`", Path(run.dir).parent)
        return None if run is None else _Tracked(run, self.items, self.seconds / 6, artifact=self.artifact)

    def _init_again(self, mode: Mode, run_id: str, settings: Mapping[str, Any]) -> WandbRun:
        import wandb

        wandb.teardown()  # after a failed start, W&B's own process still holds the run's id
        return self._init(mode, run_id, settings)

    def _init(self, mode: Mode, run_id: str, settings: Mapping[str, Any]) -> WandbRun:
        import wandb

        Path(self.dir).mkdir(parents=True, exist_ok=True)
        choices = settings["choices"]
        return wandb.init(
            project=self.project,
            entity=self.entity,
            dir=self.dir,
            id=run_id,
            resume="allow" if mode == "online" else None,
            name=self.names.get(run_id) or called(settings["choices"]),
            group=self.group,
            tags=list(dict.fromkeys([*choices.values(), *settings["eval"], *self.tags])),
            config=flat(settings),
            reinit="finish_previous",
            settings=wandb.Settings(
                mode=mode,
                init_timeout=self.seconds / 4,
                finish_timeout=self.seconds / 7,
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,  # a remote's address may contain a password
                x_disable_meta=True,  # host, user and command line are private
                x_disable_machine_info=True,
            ),
        )


class _Tracked:
    """One W&B run: logging takes at most this many seconds per run, closing as many again; nothing raises."""

    def __init__(self, run: WandbRun, items: int, seconds: float, *, artifact: bool) -> None:
        self._run, self._items, self._artifact = run, items, artifact
        self._left = self._reserve = seconds
        self._lost: list[str] = []  # not tried again: otherwise every training step would warn

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._safely("metrics of a step", lambda: self._run.log(dict(metrics), step=step))

    def finish_with(self, run: Run, model: Path | None = None) -> None:
        """Log the result part by part, figures last; if one part fails, the others are still logged."""
        parts: dict[str, Callable[[], Any]] = {
            "metrics": lambda: self._run.summary.update(_summary(run)),
            "items": lambda: self._show_items(run.items),
        }
        for suite in run.config["eval"]:
            parts[f"figure of {suite}"] = partial(self._show_figure, run, suite)
        if self._artifact and model is not None:
            parts["compressed model"] = lambda: self._send(run, model)
        for what, show in parts.items():
            self._safely(what, show)
        if self._lost:
            log.warning(
                "run %s is incomplete on W&B, missing %s; its folder has all of it", run.id, ", ".join(self._lost)
            )

    def close(self, exit_code: int) -> None:
        _within(self._reserve, "closing", lambda: self._run.finish(exit_code=exit_code) or True)

    def _safely(self, what: str, call: Callable[[], Any]) -> None:
        """Do it in the remaining time, or note it as lost; if no time is left, do not try."""
        if what in self._lost:
            return
        start = time.perf_counter()
        worked = self._left > 0 and _within(self._left, f"showing the {what}", lambda: (call(), True)[1])
        self._left -= time.perf_counter() - start
        if not worked:
            self._lost.append(what)

    def _send(self, run: Run, model: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"compressed-{run.id}", type="model", metadata=flat(run.config))
        artifact.add_dir(str(model))
        self._run.log_artifact(artifact)

    def _show_items(self, items: pl.DataFrame) -> None:
        import wandb

        shown = items if items.height <= self._items else items.gather_every(-(-items.height // self._items))
        self._run.log({"items": wandb.Table(columns=[*shown.columns], data=_plain(shown))})
        self._run.summary.update({"items_in_table": shown.height, "items_in_all": items.height})

    def _show_figure(self, run: Run, suite: str) -> None:
        import wandb

        from knowledge_compression.results.drawing import literal_text, task_figure

        with literal_text():
            if (figure := task_figure(run, suite)) is not None:
                self._run.log({f"figures/{suite}": wandb.Image(_drawn(figure))})


def _summary(run: Run) -> dict[str, Any]:
    """The metrics and the compression's results, by their names on W&B.

    Values that are not finite become text: W&B stores null for NaN and shows nothing.
    """
    reached = run.report.get("compression", {})
    told = {name.replace(".", "/"): value for name, value in run.metrics.items()}
    told |= {f"compression/{name}": v for name, v in reached.items() if isinstance(v, (int, float))}
    void = {f"{suite}/void": why for suite, why in run.void.items()}
    return {name: value if math.isfinite(value) else _SPELT[str(value)] for name, value in told.items()} | void


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings one level deep, names joined by underscores so that W&B can filter and group by them.

    Values that look like secrets, by name or because the environment has them under such a name, are left out.
    """
    found: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{prefix}_{key}" if prefix else str(key), inner)
        elif not (prefix.endswith("_target_") or is_secret(prefix, value)):
            found[prefix] = value

    add("", {name: part for name, part in settings.items() if name != "choices"})
    return found | dict(settings["choices"])


def _drawn(figure: Figure) -> Image:
    """The figure as a picture, without pyplot and its global state."""
    from PIL import Image as pillow

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return pillow.open(buffer)


def _plain(items: pl.DataFrame) -> list[list[Any]]:
    """Rows of strings, numbers and booleans; nested values become complete JSON."""
    return [
        [json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict) else cell for cell in row]
        for row in items.iter_rows()
    ]


def _within(seconds: float, what: str, call: Callable[[], Any]) -> Any:
    """The result of ``call``, or None with a warning if it raises or takes too long; a late call is abandoned."""
    outcome: list[Any] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=f"wandb {what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if outcome:
        return outcome[0]
    why = " ".join(str(errors[0]).split())[:200] if errors else f"no answer in {seconds:.0f} s"
    log.warning("W&B: %s did not work (%s); the run continues without it", what, why)
    return None
