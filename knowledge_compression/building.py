"""Building the parts of a run from plain data; unknown fields and invalid values are refused here."""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib import import_module
from typing import Annotated, Any, Union, cast, get_args, get_origin, get_type_hints

from pydantic import Field, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from knowledge_compression.errors import BadInput, first_line
from knowledge_compression.identity import TARGET, rounded

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed that every random generator accepts: torch's, numpy's and Python's."""


Positive = Annotated[int, Field(ge=1)]
"""A count of at least one."""


def build(where: str, settings: Mapping[str, Any], kind: type | None = None) -> Any:
    """The part that plain data describes; nested parts are built, and all values checked, in the same way.

    Args:
        where: its name in messages, e.g. ``compression``.
        settings: its fields as plain data, with its class under ``_target_``.
        kind: its class, if the data names none.

    Raises:
        BadInput: no class is named, a field is missing or unknown, or a value has the wrong type or range.
    """
    if TARGET in settings:
        kind = _class(where, settings[TARGET])
    if kind is None:
        raise BadInput(f"{where} has settings ({', '.join(settings)}) but is not chosen; choose it, or remove them")
    known = {field.name: field for field in fields(cast(Any, kind)) if field.init}
    given = {str(name): value for name, value in settings.items() if name != TARGET}
    for name in given.keys() - known.keys():
        raise BadInput(f"there is no setting {where}.{name}{nearest(name, known)}; {where} has {', '.join(known)}")
    for name, field in known.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise BadInput(f"{where}.{name} must be given")
    hints = _hints(kind)
    values = {name: fitting(f"{where}.{name}", value, hints[name]) for name, value in given.items()}
    try:
        return kind(**values)
    except BadInput:
        raise
    except (TypeError, ValueError, OverflowError) as error:  # a user's own class with its own checks
        raise BadInput(f"{where} does not take these settings: {first_line(error)}") from None


def fitting(where: str, value: Any, hint: Any) -> Any:
    """Convert a value to its field's type: parts are built, numbers put into one plain form.

    Raises:
        BadInput: it has the wrong type, is out of range, is not a number, or is longer than 64 bits.
    """
    if isinstance(value, Mapping) and TARGET in value:
        return build(where, value)
    if isinstance(value, Mapping) and (part := _part_in(hint)) is not None:
        return build(where, value, part)
    if isinstance(value, Mapping) and any(isinstance(one, Mapping) and TARGET in one for one in value.values()):
        return {str(name): fitting(f"{where}.{name}", one, Any) for name, one in value.items()}
    if isinstance(value, Sequence) and any(isinstance(one, Mapping) and TARGET in one for one in value):
        return [fitting(f"{where}.{place}", one, Any) for place, one in enumerate(value)]
    if _is_made(value, hint):
        return value
    try:
        adapter = _adapter(hint)
    except PydanticSchemaGenerationError:
        raise BadInput(f"{where}={value} does not fit: it is a part, which has settings") from None
    for number in _numbers(value):
        if isinstance(number, float) and not math.isfinite(number):
            raise BadInput(f"{where}={value} does not fit: it must be a finite number")
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            raise BadInput(f"{where}={value} does not fit: no setting is longer than 64 bits")
    try:
        return adapter.validate_json(json.dumps(_rounded(value)), strict=True)
    except ValidationError as error:
        raise BadInput(f"{where}={_shown(value)} does not fit: {_expected(error)}") from None
    except TypeError:
        raise BadInput(f"{where}={value} does not fit: {type(value).__name__} is not a plain value") from None


def nearest(name: str, there: Iterable[str]) -> str:
    """The name that was probably meant, in brackets; empty if none is similar."""
    close = difflib.get_close_matches(name, list(there), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _class(where: str, path: Any) -> type:
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        package = module.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        remedy = f"; put the folder that holds {package} on PYTHONPATH, or install it" if absent else ""
        raise BadInput(f"{where}: {path} cannot be imported ({first_line(error)}){remedy}") from None
    if not (isinstance(found, type) and is_dataclass(found)):
        raise BadInput(f"{where}: {path} is not a dataclass, so its settings cannot be read")
    return found


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


_adapter = cache(TypeAdapter)


def _options(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            yield from _options(option)
    else:
        yield hint


def _part_in(hint: Any) -> type | None:
    """The class of a nested part that a field is declared to hold."""
    return next((one for one in _options(hint) if isinstance(one, type) and is_dataclass(one)), None)


def _is_made(value: Any, hint: Any) -> bool:
    """Whether a caller of the library passed the part itself."""
    if isinstance(value, list | tuple):
        return any(is_dataclass(one) for one in value)
    if isinstance(value, Mapping):
        return any(is_dataclass(one) for one in value.values())
    return is_dataclass(value) and any(isinstance(one, type) and isinstance(value, one) for one in _options(hint))


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return rounded(value) if isinstance(value, float) else value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _expected(error: ValidationError) -> str:
    """What would be accepted, in a few words; for a union, the closest alternative."""
    return ", or ".join(dict.fromkeys(one["msg"].removeprefix("Input ") for one in error.errors()))
