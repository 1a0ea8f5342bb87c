"""Runs shown on Weights & Biases, or kept on disk for ``wandb sync``; whatever happens to W&B, the run goes on."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import polars as pl

from knowledge_compression.errors import BadInput
from knowledge_compression.results.store import Run
from knowledge_compression.results.summary import task_figure
from knowledge_compression.results.tracker import TrackedRun, Unseen

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from wandb import Run as WandbRun

log = logging.getLogger(__name__)

# Reports of W&B's own errors to its makers hold the process up at its end for 20 s where their server does not answer.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

_SECRET = re.compile(r"(token|secret|password|credentials?|apikey|_key)$", re.IGNORECASE)


Mode = Literal["online", "offline"]


@dataclass(frozen=True)
class WandbTracker:
    """Weights & Biases.

    Attributes:
        project, entity: where the run is shown; without an entity, the one that is logged in.
        mode: ``online``, or ``offline``.
        group: runs that belong together; the command line puts the sweep here where the user gave nothing.
        tags: beside the names of what was chosen.
        items: most rows of the table of items.
        artifact: whether the compressed model, where the run saves it, is shown as an artifact of type ``model``.
        seconds: what the tracker may cost a run at most.
        dir: the folder under which ``wandb/`` is kept.
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

    def __post_init__(self) -> None:
        """Refuse an online tracker that nobody is logged in for; a prompt would stop a sweep in the night."""
        import wandb

        if self.mode not in get_args(Mode):
            raise BadInput(f"tracker.mode={self.mode} does not exist; choose one of {', '.join(get_args(Mode))}")
        if self.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise BadInput(
                "tracker=wandb finds no login; run `wandb login`, set WANDB_API_KEY, or choose tracker=wandb_offline"
            )

    @contextmanager
    def track(self, run_id: str, settings: Mapping[str, Any]) -> Iterator[TrackedRun]:
        """Start the run's page, or take up the one that an interrupted run of the same hash left; close it always.

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

        wandb.teardown()  # a start that failed keeps the run's id busy inside W&B's own process
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
            name=readable_name(settings),
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
                disable_git=True,  # a remote's address may hold a password
                x_disable_meta=True,  # host, user and command line are nobody's business there
                x_disable_machine_info=True,
            ),
        )


class _Tracked:
    """One W&B run: showing may take so many seconds over the whole run, closing as many again, and nothing raises."""

    def __init__(self, run: WandbRun, items: int, seconds: float, *, artifact: bool) -> None:
        self._run, self._items, self._artifact = run, items, artifact
        self._left = self._reserve = seconds

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._safely("showing metrics", lambda: self._run.log(dict(metrics), step=step))

    def finish_with(self, run: Run, model: Path | None = None) -> None:
        self._safely("showing the result", lambda: self._show(run))
        if self._artifact and model is not None:
            self._safely("showing the compressed model", lambda: self._send(run, model))

    def close(self, exit_code: int) -> None:
        _within(self._reserve, "closing", lambda: self._run.finish(exit_code=exit_code) or True)

    def _safely(self, what: str, call: Callable[[], Any]) -> None:
        if self._left > 0:
            start = time.perf_counter()
            worked = _within(self._left, what, lambda: (call(), True)[1])
            self._left = self._left - (time.perf_counter() - start) if worked else 0.0

    def _send(self, run: Run, model: Path) -> None:
        import wandb

        artifact = wandb.Artifact(f"compressed-{run.id}", type="model", metadata=flat(run.config))
        artifact.add_dir(str(model))
        self._run.log_artifact(artifact)

    def _show(self, run: Run) -> None:
        import wandb

        items = asked = run.items
        if items.height > self._items:
            items = items.gather_every(-(-items.height // self._items))
        self._run.log(
            {"items": wandb.Table(columns=[*items.columns], data=_plain(items))}
            | {f"figures/{name}": wandb.Image(_drawn(figure)) for name, figure in _figures(run).items()}
        )
        reached = run.report.get("compression", {})
        self._run.summary.update(
            {name.replace(".", "/"): value for name, value in run.metrics.items()}
            | {f"compression/{name}": v for name, v in reached.items() if isinstance(v, (int, float))}
            | {"items_in_table": items.height, "items_in_all": asked.height}
        )


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings one level deep, names joined by underscores so that W&B can filter and group by them.

    Values that look like secrets, by their name or because the environment keeps them under such a name, are left out.
    """
    secrets = {value for name, value in os.environ.items() if value and _SECRET.search(name)}
    found: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{prefix}_{key}" if prefix else str(key), inner)
        elif not (prefix.endswith("_target_") or _SECRET.search(prefix) or str(value) in secrets):
            found[prefix] = value

    add("", {name: part for name, part in settings.items() if name != "choices"})
    return found | dict(settings["choices"])


def readable_name(settings: Mapping[str, Any]) -> str:
    """What a person calls the run, e.g. ``smollm2 att magnitude 0.2``."""
    choices = settings["choices"]
    dense = choices["compression"] == "none"
    asked = () if dense else (choices["target"], choices["compression"])
    sparsity = settings["compression"].get("sparsity") if not dense else None
    recovery = () if choices["recovery"] == "none" else (choices["recovery"],)
    parts = [choices["model"], *(asked or ("dense",)), *(() if sparsity is None else (sparsity,)), *recovery]
    return " ".join(map(str, [*parts, *((f"seed {settings['seed']}",) if settings.get("seed") else ())]))


def _figures(run: Run) -> dict[str, Figure]:
    return {suite: figure for suite in run.config["eval"] if (figure := task_figure(run, suite)) is not None}


def _drawn(figure: Figure) -> Image:
    """The figure as a picture, without pyplot and its global state."""
    from PIL import Image as pillow

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return pillow.open(buffer)


def _plain(items: pl.DataFrame) -> list[list[Any]]:
    """Rows of strings, numbers and truth values; what is nested becomes text."""
    nested = [name for name, dtype in items.schema.items() if dtype.is_nested()]
    plain = items.with_columns(pl.col(name).map_elements(str, return_dtype=pl.String) for name in nested)
    return [list(row) for row in plain.iter_rows()]


def _within(seconds: float, what: str, call: Callable[[], Any]) -> Any:
    """What ``call`` gives, or None with a warning where it raises or takes longer; a late one is left to itself."""
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
    log.warning("W&B: %s did not work (%s); the run goes on without", what, why)
    return None
