"""The required content of a run's files, checked before use: a store may be damaged or come from anyone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from knowledge_compression.errors import first_line
from knowledge_compression.evaluation.suite import ITEM_COLUMNS
from knowledge_compression.heavy import pl

_LARGEST = 1_000_000  # values in one file, counting YAML aliases each time: a few lines can expand to millions
_OPEN = ConfigDict(extra="allow", strict=True)
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Choices(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    model: str
    target: str
    compression: str
    recovery: str
    corpus: NotRequired[str]


class _HowCompressed(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    sparsity: NotRequired[float | None]
    bits: NotRequired[float | None]


class _HowRecovered(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    prompts: NotRequired[list[int]]
    rank: NotRequired[int]
    tokens: NotRequired[int]


class _Config(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    choices: _Choices
    eval: dict[str, dict[str, Any]]
    seed: int | None  # of the random draws; None if there were none
    sparsity: float | None  # None if unknown
    reading: str
    compression: _HowCompressed
    recovery: NotRequired[_HowRecovered]


class _Model(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str
    family: str
    note: NotRequired[str]


class _Compressed(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    sparsity: NotRequired[Share | None]
    bits: NotRequired[Annotated[float, Field(ge=0)] | None]
    stored_bytes: NotRequired[Annotated[float, Field(ge=0)]]
    parameters_touched: NotRequired[Count]
    model_parameters: NotRequired[Count]
    layers: NotRequired[list[dict[str, Any]]]


class _Recovered(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    strategy: NotRequired[str]
    restores_by: NotRequired[Literal["nothing", "weights", "redirection"]]
    trainable_parameters: NotRequired[Count | None]


class _Cost(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    seconds: NotRequired[dict[str, float]]


class _Asked(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    not_finite: NotRequired[Count]


class _Report(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    model: _Model
    eval: dict[str, _Asked]
    compression: NotRequired[_Compressed]
    recovery: NotRequired[_Recovered]
    cost: NotRequired[_Cost]
    non_finite_weights: NotRequired[dict[str, Count]]


class Layer(TypedDict):
    """One layer of ``layers.json``."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    path: str
    role: NotRequired[str]
    parameters: NotRequired[Count]
    removed: NotRequired[Count]
    bits: NotRequired[float | None]
    error_after: NotRequired[float | None]


_SHAPES: Mapping[str, TypeAdapter[Any]] = {
    "config.yaml": TypeAdapter(_Config),
    "metrics.json": TypeAdapter(dict[str, float | None], config=ConfigDict(strict=True)),
    "report.json": TypeAdapter(_Report),
    "environment.json": TypeAdapter(dict[str, Any], config=ConfigDict(strict=True)),
    "layers.json": TypeAdapter(list[Layer]),
}


def checked(name: str, content: Any) -> Any:
    """A file's content, checked for missing fields and wrong types; null metrics become nan.

    Raises:
        ValueError: a check fails; the message names the value.
    """
    _check_size(content, [0], {})
    try:
        _SHAPES[name].validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{place}: {first['msg']}") from None
    if name == "metrics.json":
        return {metric: math.nan if value is None else value for metric, value in content.items()}
    return content


def check_agreement(config: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Refuse a report that lacks one of the run's suites.

    Raises:
        ValueError: it does.
    """
    if silent := [suite for suite in config["eval"] if suite not in report["eval"]]:
        raise ValueError(f"eval.{silent[0]}: Field required")


def read_json(path: Path) -> Any:
    """Read a JSON file whose text can be written again.

    Raises:
        ValueError: it is not JSON.
    """
    content = path.read_bytes()
    found = json.loads(content)
    if b"\\ud" in content.lower():  # lone surrogates, which are not text
        json.dumps(found, ensure_ascii=False).encode()
    return found


def finite(value: Any) -> Any:
    """A value with None in place of numbers that are not finite, at any depth."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def columns_of(path: Path, *, whole: bool) -> dict[str, str]:
    """The columns of an item table, and what they hold.

    Args:
        path: the Parquet file.
        whole: whether to decode all of it, because nothing else shows that it is undamaged.

    Raises:
        ValueError: the file cannot be decoded.
    """
    try:
        schema = pl.scan_parquet(path, glob=False).collect_schema()
        if whole:
            pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:  # the latter is not an Exception
        raise ValueError(first_line(error)) from None
    return {name: str(dtype) for name, dtype in schema.items()}


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse an item table without the columns of a run.

    Raises:
        ValueError: a column is missing or of another kind.
    """
    for name, kind in ITEM_COLUMNS.items():
        if name in columns and columns[name] not in (kind, "Null"):
            raise ValueError(f"column {name} is {columns[name]}, not {kind}")
    needed = ("suite", "task", "id", "prompt", "gold", "prediction", "correct")
    if missing := [name for name in needed if name not in columns]:
        raise ValueError(f"column {missing[0]} is missing")


def _check_size(value: Any, counted: list[int], inside: dict[int, bool]) -> None:
    """Count the values inside a value, and refuse one that contains itself."""
    counted[0] += 1
    if counted[0] > _LARGEST:
        raise ValueError(f"it expands to more than {_LARGEST:,} values")
    if isinstance(value, dict | list):
        if inside.get(id(value)):
            raise ValueError("it contains itself")
        inside[id(value)] = True
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, dict | list):
                _check_size(part, counted, inside)
            else:
                counted[0] += 1
        inside[id(value)] = False
