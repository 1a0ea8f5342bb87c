"""The meaning of a name in a data folder: a task, a group of tasks, or all tasks with a tag."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.tasks.own import files_of

LOCAL: Mapping[str, Mapping[str, Any]] = yaml.safe_load(files(__package__).joinpath("local.yaml").read_text())
_TABLES: Mapping[str, Mapping[str, Any]] = yaml.safe_load(files(__package__).joinpath("tables.yaml").read_text())


class Members(NamedTuple):
    """A group's tasks, and the metrics of which it reports a mean, each with whether items weight it."""

    tasks: list[str]
    means: dict[str, bool]


@dataclass(frozen=True)
class Named:
    """The tasks that names stand for, and the groups among them."""

    tasks: list[str] = field(default_factory=list)
    groups: dict[str, Members] = field(default_factory=dict)

    def __or__(self, other: Named) -> Named:
        """Both, each task once."""
        return Named(list(dict.fromkeys([*self.tasks, *other.tasks])), self.groups | other.groups)


@dataclass(frozen=True)
class Shipped:
    """lm-eval's own tasks that a data folder may hold.

    Attributes:
        tasks: how each task is read from the folder, see ``local.yaml`` and ``tables.yaml``.
        groups: lm-eval's settings of each group.
        tags: the tasks with each tag.
    """

    tasks: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Mapping[str, Any]]
    tags: Mapping[str, Sequence[str]]


def lm_eval_tasks() -> Path:
    """The folder of task files that lm-eval ships; lm-eval is not imported, which takes seconds."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks"


@lru_cache
def shipped() -> Shipped:
    """lm-eval's own tasks that a data folder may hold."""
    tasks = dict(LOCAL)
    groups: dict[str, Mapping[str, Any]] = {}
    tags: dict[str, list[str]] = {}
    for family in _TABLES.values():
        for path in sorted((lm_eval_tasks() / family["stock"]).glob("*.yaml")):
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            if "group" in settings:
                groups[settings["group"]] = settings
            elif "task" in settings:
                where = {split: file.format(settings["dataset_name"]) for split, file in family["files"].items()}
                tasks[settings["task"]] = {**family, "stock": f"{family['stock']}/{path.name}", "files": where}
                tags.setdefault(settings["tag"], []).append(settings["task"])
    return Shipped(tasks, groups, tags)


def named(name: str, folder: Path, *, allow_code: bool = False) -> Named:
    """What ``name`` means: a shipped task, group or tag, or a user's own under ``folder``.

    A user's own task or group is a file ``NAME.yaml`` in lm-eval's format; a tag is one of a user's own tasks.

    Raises:
        BadInput: nothing has this name; or a group contains itself, or contains anything other than names.
    """
    return _named(name, folder, (), allow_code)


def _named(name: str, folder: Path, above: tuple[str, ...], allow_code: bool) -> Named:
    if name in above:
        raise BadInput(f"group {name} contains itself ({' > '.join((*above, name))})")
    ours = shipped()
    if name in ours.tasks:
        return Named([name])
    if name in ours.tags:
        return Named(list(ours.tags[name]))
    if name in ours.groups:
        settings, where = dict(ours.groups[name]), f"group {name}"
    else:
        definition = own_file(name, folder)
        if definition is None:
            return Named(_tagged(name, folder, allow_code))
        settings, where = files_of(definition, allow_code=allow_code)[0], str(definition)
        if "group" not in settings:
            return Named([name])
    children = settings.get("task")
    children = [children] if isinstance(children, str) else children
    if not isinstance(children, list) or not children or not all(isinstance(child, str) for child in children):
        raise BadInput(f"{where} is a group, so task: must be a list of names, not {children}")
    found = Named()
    for child in children:
        found |= _named(child, folder, (*above, name), allow_code)
    return Named(found.tasks, {name: Members(found.tasks, _means(settings, where))} | found.groups)


def _means(settings: Mapping[str, Any], where: str) -> dict[str, bool]:
    metrics = settings.get("aggregate_metric_list") or []
    metrics = [metrics] if isinstance(metrics, Mapping) else metrics
    if not isinstance(metrics, list) or not all(isinstance(one, Mapping) and one.get("metric") for one in metrics):
        raise BadInput(f"{where}: aggregate_metric_list is not a list of mappings, e.g. [{{metric: acc}}]")
    if other := [one["aggregation"] for one in metrics if one.get("aggregation", "mean") != "mean"]:
        raise BadInput(f"{where}: aggregation: {other[0]} is not known for a group; only mean is")
    return {str(one["metric"]): bool(one.get("weight_by_size", True)) for one in metrics}


def own_file(name: str, folder: Path) -> Path | None:
    """The file ``NAME.yaml``, anywhere under ``folder``, that defines a user's own task or group."""
    return next((path for path in sorted(folder.rglob("*.yaml")) if path.stem == name), None)


def _tagged(tag: str, folder: Path, allow_code: bool) -> list[str]:
    """A user's own tasks with a tag.

    Raises:
        BadInput: there is none, so the name means nothing.
    """
    tasks = [path.stem for path in sorted(folder.rglob("*.yaml")) if tag in _tags_of(path, allow_code)]
    if not tasks:
        known = [*shipped().tasks, *shipped().groups]
        raise BadInput(f"{unknown_task(tag, known)}; a task of your own is a file {tag}.yaml under data_dir={folder}")
    return tasks


def _tags_of(path: Path, allow_code: bool) -> Iterator[str]:
    try:
        tags = files_of(path, allow_code=allow_code)[0].get("tag") or []
    except (BadInput, DataUnavailable):  # an error in another file, which is reported when that file is used
        return
    yield from [tags] if isinstance(tags, str) else (tag for tag in tags if isinstance(tag, str))


def unknown_task(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """The message for an unknown task: similar names, or a short list."""
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
    return f"task {name} is not known; " + (f"similar names: {', '.join(near)}" if near else f"try {', '.join(LOCAL)}")
