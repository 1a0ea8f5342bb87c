"""lm-evaluation-harness tasks by name, from the hub or from a folder of local files."""

from __future__ import annotations

import difflib
import hashlib
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from knowledge_compression.errors import BadInput, DataUnavailable
from knowledge_compression.evaluation.tasks.own import files_of, of_the_task, sandboxed
from knowledge_compression.reading import objects

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

LOCAL: Mapping[str, Mapping[str, Any]] = yaml.safe_load(files(__package__).joinpath("local.yaml").read_text())


def load_tasks(names: Sequence[str], data_dir: str | None, *, allow_code: bool = False) -> dict[str, Task]:
    """The stock tasks, with documents from ``data_dir`` or, if that is None, from the hub.

    Raises:
        BadInput: a name is unknown, a local file lacks what the task's prompts need, or it holds code that is not
            allowed.
        DataUnavailable: a local file is missing, or the hub did not answer.
    """
    if data_dir is not None:
        for name in names:
            local_files(name, data_dir, allow_code=allow_code)
    loaded: dict[str, Task] = {}
    with _quiet(), sandboxed(), tempfile.TemporaryDirectory() as folder:
        manager = _manager(names, data_dir, Path(folder))
        for name in names:
            try:
                if data_dir is not None and name not in LOCAL:
                    with of_the_task(name):
                        loaded |= manager.load([name])["tasks"]
                else:
                    loaded |= manager.load([name])["tasks"]
            except BadInput:
                raise
            except (
                Exception
            ) as error:  # datasets and the hub raise many kinds of error; all mean that there are no documents
                line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]
                raise DataUnavailable(
                    f"task {name}: its documents could not be loaded ({line}); give local files with data_dir=DIR"
                ) from error
    return loaded


def local_files(name: str, data_dir: str, *, allow_code: bool = False) -> list[Path]:
    """The files that the task ``name`` reads under ``data_dir``, checked line by line.

    Raises:
        BadInput: the task has no local form, or a line is not JSON or lacks a column.
        DataUnavailable: the folder or a file is missing.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataUnavailable(f"data_dir={data_dir} is not a folder")
    if name not in LOCAL:
        definition = own_task(name, root)
        settings, included = files_of(definition, allow_code=allow_code)
        return [*included, *_own_documents(definition, settings).values()]
    paths = [root / path for path in LOCAL[name]["files"].values()]
    for path in paths:
        if not path.is_file():
            raise DataUnavailable(f"task {name}: data_dir={data_dir} has no {path.relative_to(root)}")
        _check_lines(path, LOCAL[name]["fields"])
    return paths


def own_task(name: str, folder: Path) -> Path:
    """The file ``NAME.yaml``, anywhere under ``folder``, that defines a user's own task in lm-eval's format.

    Raises:
        BadInput: there is no such file.
    """
    for path in sorted(folder.rglob("*.yaml")):
        if path.stem == name:
            return path
    raise BadInput(f"{unknown_task(name, LOCAL)}; a task of your own is a file {name}.yaml under data_dir={folder}")


def _own_documents(definition: Path, settings: Mapping[str, Any]) -> dict[str, Path]:
    """The file of each split of a user's own task: beside its definition or below.

    Raises:
        BadInput: the definition names no files, or files outside its folder.
        DataUnavailable: a file is missing.
    """
    kwargs = settings.get("dataset_kwargs")
    named = kwargs.get("data_files") if isinstance(kwargs, Mapping) else None
    if not isinstance(named, Mapping) or not all(isinstance(word, str) for word in (*named, *named.values())):
        raise BadInput(f"{definition} names no documents; dataset_kwargs: {{data_files: {{SPLIT: FILE}}}} is read")
    documents = {split: definition.parent / str(file) for split, file in named.items()}
    for path in documents.values():
        if not path.resolve().is_relative_to(definition.parent.resolve()):
            raise BadInput(f"{definition} reads {path.name} from elsewhere; its documents lie beside it")
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
    for name in names:
        try:
            for path in local_files(name, data_dir, allow_code=allow_code):
                sha.update(f"{name}:{path.name}:".encode() + path.read_bytes())
        except DataUnavailable:
            if not skip_missing:
                raise
    return sha.hexdigest()[:16]


def unknown_task(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """The message for an unknown task: similar names, or a short list."""
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
    return f"task {name} is not known; " + (f"near it are: {', '.join(near)}" if near else f"try {', '.join(LOCAL)}")


def _manager(names: Sequence[str], data_dir: str | None, folder: Path) -> TaskManager:
    """A task manager that knows ``names``; lm-eval's whole index (6-9 s) is read only if needed."""
    from lm_eval.tasks import TaskManager

    if data_dir is None and any(name not in LOCAL for name in names):
        manager = TaskManager()
        for name in names:
            if name not in manager.task_index:
                raise BadInput(unknown_task(name, manager.all_tasks))
        return manager
    for name in names:
        settings = _stock(name, data_dir) if name in LOCAL else _own(name, Path(data_dir or ".").expanduser())
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | settings))
    return TaskManager(include_path=str(folder), include_defaults=False)


def _stock(name: str, data_dir: str | None) -> dict[str, Any]:
    """A stock task's settings; with ``data_dir``, its documents come from there."""
    import lm_eval

    settings: dict[str, Any] = {"include": str(Path(lm_eval.__file__).parent / "tasks" / LOCAL[name]["stock"])}
    if data_dir is not None:
        where = {split: str(Path(data_dir).expanduser() / path) for split, path in LOCAL[name]["files"].items()}
        settings |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": where}}
        settings |= {f"{split}_split": split if split in where else None for split in _SPLITS}
    return settings | LOCAL[name].get("settings", {})


def _own(name: str, folder: Path) -> dict[str, Any]:
    """The settings of a user's own task; its documents are read from beside it, whatever the working directory."""
    definition = own_task(name, folder)
    settings, _ = files_of(definition, allow_code=True)  # already checked, by local_files
    documents = {split: str(path.resolve()) for split, path in _own_documents(definition, settings).items()}
    kwargs = {"data_files": documents}
    return {"include": str(definition.resolve()), "dataset_path": "json", "dataset_kwargs": kwargs}


_SPLITS = ("training", "validation", "test")


def _check_lines(path: Path, fields: Sequence[str]) -> None:
    for number, row in objects(path):
        if any(field not in row for field in fields):
            raise BadInput(f"{path} line {number} lacks a column; needed are {', '.join(fields)}")


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
