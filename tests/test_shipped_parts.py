"""Every part that is shipped: made in any way it is the same, and a value of the wrong kind is one line."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given, settings
from hypothesis import strategies as st

import knowledge_compression as kc
from helpers.places import EXHAUSTIVE
from helpers.shipped import shipped
from knowledge_compression.building import build
from knowledge_compression.configuration import made_of, settings_of
from knowledge_compression.errors import BadInput
from knowledge_compression.identity import identity, plain
from knowledge_compression.sweeping.cli import CONF

pytestmark = pytest.mark.slow

CHOICES = shipped("compression", "recovery", "corpus", "target", "eval")
CHOICES += ["model=bert_tiny", "model=smollm2", "model=world_decoder", "model=olmo2_1b"]
_SIMPLE = (bool, int, float, type(None))


@cache
def part_of(choice: str) -> Any:
    """A shipped part; what must be given names nothing that is there."""
    needed = {"corpus=text": {"path": "no.txt"}, "recovery=adapter": {"path": "no"}}.get(choice, {})
    return kc.choose(choice, **needed)


def where(choice: str) -> str:
    group = choice.partition("=")[0]
    return f"eval.{next(iter(composed(choice).eval))}" if group == "eval" else group


def composed(choice: str, *overrides: str) -> Any:
    group, _, name = choice.partition("=")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[f"eval=[{name}]" if group == "eval" else choice, *overrides])


def typed(choice: str, field: str, value: Any) -> Any:
    """The part of a command line."""
    place = where(choice)
    config = composed(choice, f"++{place}.{field}={'null' if value is None else str(value).lower()}")
    made = made_of(choice.partition("=")[0], settings_of(config)[choice.partition("=")[0]])
    return next(iter(made.values())) if choice.startswith("eval") else made


def simple_fields(choice: str) -> list[str]:
    part = part_of(choice)
    return [f.name for f in fields(part) if f.init and isinstance(getattr(part, f.name), _SIMPLE)]


def value_like(value: Any) -> st.SearchStrategy[Any]:
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(0, 300)
    if isinstance(value, float):
        return st.integers(0, 1000).map(lambda n: n / 1000)
    return st.none() | st.integers(1, 64)


@settings(max_examples=200 if EXHAUSTIVE else 4)
@given(st.data())
def test_equal_parts_are_one_however_they_were_made(data: st.DataObject) -> None:
    choice = data.draw(st.sampled_from([one for one in CHOICES if simple_fields(one)]))
    part = part_of(choice)
    field = data.draw(st.sampled_from(simple_fields(choice)))
    value = data.draw(value_like(getattr(part, field)))
    try:
        chosen = kc.choose(choice, **{field: value}, **({"path": part.path} if hasattr(part, "path") else {}))
    except BadInput as refused:
        assert "\n" not in str(refused)
        if choice not in ("corpus=text", "recovery=adapter"):  # which lack a value on this command line
            with pytest.raises(BadInput):
                typed(choice, field, value)
        return
    replaced = replace(part, **{field: value})
    if not hasattr(part, "path"):
        assert plain(typed(choice, field, value)) == plain(chosen)
    assert plain(replaced) == plain(chosen) and plain(build("part", plain(chosen))) == plain(chosen)


def other(value: Any) -> Any:
    """Another value of that kind."""
    if isinstance(value, Enum):
        return f"{value.value}x"
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, Mapping):
        return {**value, "another": 1}
    return [*value, *(value[-1:] or ["x"])]


def with_another(part: Any, name: str) -> Any:
    """A copy in which one field is another, whether or not the part would take it."""
    changed = copy(part)
    object.__setattr__(changed, name, other(getattr(part, name)))
    return changed


def deciding(part: Any) -> Any:
    """The identity, without what lies at its places."""
    return {key: value for key, value in identity_of_fields(part).items() if key != "content"}


def identity_of_fields(part: Any) -> dict[str, Any]:
    kind = type(part)
    if not hasattr(part, "fingerprint"):
        return dict(identity(part))
    blind = type(kind.__name__, (kind,), {"fingerprint": lambda self: "what lies there", "__module__": kind.__module__})
    changed = copy(part)
    object.__setattr__(changed, "__class__", blind)
    return dict(identity(changed))


@pytest.mark.parametrize("choice", CHOICES)
def test_what_a_field_is_marked_as_says_whether_it_counts(choice: str) -> None:
    """Speeds, labels and places keep a part's identity; every other field changes it, also of the parts inside it."""
    parts = [part_of(choice)]
    seen = 0
    while parts:
        part = parts.pop()
        for field in fields(part):
            value = getattr(part, field.name)
            inside = [one for one in (value if isinstance(value, list | tuple) else [value]) if is_dataclass(one)]
            parts += inside
            if inside or not (field.init and field.compare):
                continue
            marked = any(field.metadata.get(mark) for mark in ("place", "speed", "label"))
            same = deciding(with_another(part, field.name)) == deciding(part)
            assert same is marked, (choice, field.name)
            seen += 1
    assert seen or not fields(part_of(choice))


def kinds_of(hint: Any) -> set[Any]:
    """The kinds of plain values that a type hint takes; Any stands for all."""
    origin = get_origin(hint)
    if origin is Annotated:
        return kinds_of(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return set().union(*map(kinds_of, get_args(hint)))
    if origin is Literal:
        return {type(value) for value in get_args(hint)}
    if hint is Any or (isinstance(hint, type) and is_dataclass(hint)):
        return {Any}
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Enum | Path):
        return {str}
    if kind in (bool, int, float, str, type(None)):
        return {kind} | ({int} if kind is float else set())
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return {dict}
    if isinstance(kind, type) and issubclass(kind, Sequence | set | frozenset):
        return {list}
    return {Any}


VALUES: list[Any] = [True, 7, 0.5, "no such value", ["no such value", 7], {"no_such": 7}, None]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_value_of_a_wrong_kind_is_one_line_for_every_field(choice: str) -> None:
    part = part_of(choice)
    hints = get_type_hints(type(part), include_extras=True)
    told = plain(part)
    for field in fields(part):
        if not field.init:
            continue
        taken = kinds_of(hints[field.name])
        for value in VALUES:
            if Any not in taken and type(value) not in taken:
                with pytest.raises(BadInput, match=rf"part\.{field.name}") as refused:
                    build("part", told | {field.name: value})
                assert "\n" not in str(refused.value)
    with pytest.raises(BadInput, match=r"there is no setting part\.colour"):
        build("part", told | {"colour": "red"})
