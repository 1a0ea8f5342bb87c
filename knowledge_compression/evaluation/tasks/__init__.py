"""lm-evaluation-harness tasks by name, from the hub or from a folder of local files."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.tasks.names import (
    LOCAL,
    Members,
    Named,
    lm_eval_tasks,
    named,
    own_file,
    shipped,
    unknown_task,
)
from knowledge_compression.evaluation.tasks.own import files_of, of_the_task, sandboxed
from knowledge_compression.evaluation.tasks.tables import as_json_lines, documents_of
from knowledge_compression.progress import underway
from knowledge_compression.reading import objects

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

__all__ = ["LOCAL", "Loaded", "fingerprint", "load_tasks", "local_files", "names_of"]


class Loaded(NamedTuple):
    """Tasks by name, and the groups through which they were selected."""

    tasks: dict[str, Task]
    groups: Mapping[str, Members]


def load_tasks(names: Sequence[str], data_dir: str | None, *, allow_code: bool = False) -> Loaded:
    """lm-eval's tasks, with documents from ``data_dir`` or, if that is None, from the hub.

    Args:
        names: tasks, groups or tags.
        data_dir: the folder of local files; None reads the hub.
        allow_code: whether a user's own task file may name functions, which are then executed.

    Raises:
        BadInput: a name is unknown, a local file lacks what the task's prompts need, or it holds code that is not
            allowed.
        DataUnavailable: a local file is missing, or the hub did not answer.
    """
    asked = names_of(names, data_dir, allow_code=allow_code)
    if data_dir is not None:
        for name in asked.tasks:
            local_files(name, data_dir, allow_code=allow_code)
    tasks: dict[str, Task] = {}
    groups: dict[str, Members] = dict(asked.groups)
    with _quiet(), sandboxed(), tempfile.TemporaryDirectory() as folder:
        with underway("reading lm-eval's tasks"):
            manager = _manager(asked.tasks, data_dir, Path(folder))
        for name in asked.tasks:
            try:
                with nullcontext() if data_dir is None or name in shipped().tasks else of_the_task(name):
                    found = manager.load([name])
            except BadInput:
                raise
            except (
                Exception
            ) as error:  # datasets and the hub raise many kinds of error; all mean that there are no documents
                line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
                raise DataUnavailable(
                    f"task {name}: its documents could not be loaded ({line}); give local files with data_dir=DIR"
                ) from error
            tasks |= found["tasks"]
            groups |= {group: _members(of) for group, of in found.get("groups", {}).items()}
    return Loaded(tasks, groups)


def names_of(names: Sequence[str], data_dir: str | None, *, allow_code: bool = False) -> Named:
    """The tasks and groups that names stand for; for the hub, the names themselves."""
    if data_dir is None:
        return Named(list(names))
    root = _folder(data_dir)
    return reduce(or_, (named(name, root, allow_code=allow_code) for name in names), Named())


def local_files(name: str, data_dir: str, *, allow_code: bool = False) -> list[Path]:
    """The files that the task ``name`` reads under ``data_dir``, checked line by line.

    Raises:
        BadInput: the task has no local form, or a line is not JSON or lacks a column.
        DataUnavailable: the folder or a file is missing.
    """
    root = _folder(data_dir)
    entry = shipped().tasks.get(name)
    if entry is None:
        definition = own_file(name, root)
        assert definition is not None  # found by names_of
        settings, included = files_of(definition, allow_code=allow_code)
        return [*included, *_own_documents(definition, settings).values()]
    paths = list(_splits(root, entry).values())
    for path in paths:
        if not path.is_file():
            raise DataUnavailable(f"task {name}: data_dir={data_dir} lacks {path.relative_to(root)}")
        if "columns" in entry:
            deque(documents_of(path, entry), maxlen=0)
        else:
            _check_lines(path, entry["fields"])
    return paths


def _folder(data_dir: str) -> Path:
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataUnavailable(f"data_dir={data_dir} is not a folder")
    return root


def _splits(root: Path, entry: Mapping[str, Any]) -> dict[str, Path]:
    """The file of each split of a shipped task; a ``train.jsonl`` beside them is for few-shot examples."""
    paths = {split: root / path for split, path in entry["files"].items()}
    train = next(iter(paths.values())).with_name("train.jsonl")
    return paths | ({"training": train} if train.is_file() and "columns" not in entry else {})


def _own_documents(definition: Path, settings: Mapping[str, Any]) -> dict[str, Path]:
    """The file of each split of a user's own task: beside its definition or below.

    Raises:
        BadInput: the definition names no files, or files outside its folder.
        DataUnavailable: a file is missing.
    """
    kwargs = settings.get("dataset_kwargs")
    named = kwargs.get("data_files") if isinstance(kwargs, Mapping) else None
    if not isinstance(named, Mapping) or not all(isinstance(word, str) for word in (*named, *named.values())):
        raise BadInput(f"{definition} lists no documents; give dataset_kwargs: {{data_files: {{SPLIT: FILE}}}}")
    documents = {split: definition.parent / str(file) for split, file in named.items()}
    for path in documents.values():
        if not path.resolve().is_relative_to(definition.parent.resolve()):
            raise BadInput(f"{definition} reads {path.name} from another folder; its documents must lie beside it")
        if not path.is_file():
            raise DataUnavailable(f"{definition} reads {path.name}, which is not beside it")
        _check_lines(path, ())
    return documents


def fingerprint(
    names: Sequence[str], data_dir: str | None, *, skip_missing: bool = False, allow_code: bool = False
) -> str:
    """Digest of the local files of the tasks; ``hub`` if there are none."""
    if data_dir is None:
        return "hub"
    sha = hashlib.sha256()
    for name in names_of(names, data_dir, allow_code=allow_code).tasks:
        try:
            for path in local_files(name, data_dir, allow_code=allow_code):
                sha.update(f"{name}:{path.name}:".encode() + path.read_bytes())
        except DataUnavailable:
            if not skip_missing:
                raise
    return sha.hexdigest()[:16]


def _manager(names: Sequence[str], data_dir: str | None, folder: Path) -> TaskManager:
    """A task manager that knows ``names``; lm-eval's whole index (6-9 s) is read only if needed."""
    from lm_eval.tasks import TaskManager

    if data_dir is None and any(name not in LOCAL for name in names):
        manager = TaskManager()
        for name in names:
            if name not in manager.task_index:
                raise BadInput(unknown_task(name, manager.all_tasks))
        return manager
    ours = shipped().tasks
    for name in names:
        root = Path(data_dir or ".").expanduser()
        settings = _stock(ours[name], root if data_dir is not None else None) if name in ours else _own(name, root)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | settings))
    return TaskManager(include_path=str(folder), include_defaults=False)


def _stock(entry: Mapping[str, Any], root: Path | None) -> dict[str, Any]:
    """A stock task's settings; with a data folder, its documents come from there."""
    settings: dict[str, Any] = {"include": str(lm_eval_tasks() / entry["stock"])}
    if root is None:
        return settings | entry.get("settings", {})
    paths = _splits(root, entry)
    if "columns" in entry:  # the splits are named as in lm-eval's own file
        paths = {split: as_json_lines(path, entry) for split, path in paths.items()}
    else:
        settings |= {f"{split}_split": split if split in paths else None for split in _SPLITS}
    where = {split: str(path) for split, path in paths.items()}
    settings |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": where}}
    return settings | entry.get("settings", {})


def _members(group: Group) -> Members:
    means = {of.metric: of.weight_by_size for of in group.aggregate_metric_list or () if of.aggregation == "mean"}
    return Members([task.task_name for task in group.get_all_tasks()], means)


def _own(name: str, folder: Path) -> dict[str, Any]:
    """The settings of a user's own task; its documents are read from the same folder."""
    definition = own_file(name, folder)
    assert definition is not None
    settings, _ = files_of(definition, allow_code=True)  # already checked, by local_files
    documents = {split: str(path.resolve()) for split, path in _own_documents(definition, settings).items()}
    kwargs = {"data_files": documents}
    return {"include": str(definition.resolve()), "dataset_path": "json", "dataset_kwargs": kwargs}


_SPLITS = ("training", "validation", "test")


def _check_lines(path: Path, fields: Sequence[str]) -> None:
    for number, row in objects(path):
        if any(field not in row for field in fields):
            raise BadInput(f"{path} line {number} lacks a column; it needs {', '.join(fields)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's remarks about every task's defaults, and progress bars for small files, out of the terminal."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        enable_progress_bar()
